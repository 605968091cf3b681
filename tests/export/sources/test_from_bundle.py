"""A bundle is enough to export again: its weights are found by their names."""

from pathlib import Path

import pytest
import torch

from export.errors import ExportError
from export.sources.bundle import from_bundle
from export.sources.run import from_run
from trainer.runs.checkpoint import newest, to_bytes
from trainer.runs.weights import fitting, start_of


def test_a_bundle_gives_back_the_network_it_was_made_from(
    tiny_run: Path, tiny_bundle: Path
) -> None:
    before, after = from_run(tiny_run, 2.0), from_bundle(tiny_bundle)
    expected, found = before.module.state_dict(), after.module.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (after.labels, after.defaults, after.prediction) == (
        before.labels,
        before.defaults,
        before.prediction,
    )
    assert after.schedule.to_json() == before.schedule.to_json()


def test_a_run_may_begin_with_a_bundles_weights(tiny_run: Path, tiny_bundle: Path) -> None:
    expected = newest(tiny_run / "checkpoints").ema
    found = fitting(start_of(tiny_bundle)[0], expected, tiny_bundle)
    assert to_bytes(found) == to_bytes(expected)


def test_a_bundle_from_elsewhere_is_refused(edited) -> None:
    folder = edited(lambda value: value["provenance"].pop("config"))
    with pytest.raises(ExportError, match="did not come from a run"):
        from_bundle(folder)
