"""The promise of the Sampler: the same request gives the same bytes, in any batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from runtime import Cancelled, Preview, Request, RequestError, Sampler
from runtime.backends.onnxruntime import OnnxRuntimeBuffers
from runtime.diffusion.noise import MAX_SEED

MIXED = [
    Request(seed=7, label=3, guidance=2.0, solver="ddim", steps=5),
    Request(seed=8, label="4", guidance=1.0, solver="ddpm", steps=9),
    Request(seed=9, label=None, solver="ddim", steps=1),
    Request(seed=MAX_SEED, label=0, guidance=3.5, solver="ddpm", steps=4),
    Request(
        seed=7, label=3, guidance=0.0, solver="ddim", steps=7, grid="linspace", options={"eta": 0.3}
    ),
    Request(seed=11, label=9, guidance=-1.0, solver="ddim", steps=3, grid=(900.0, 500.5, 20.0)),
]


@pytest.fixture(scope="module")
def alone(sampler: Sampler) -> list[bytes]:
    return [sampler.sample_requests([request]).tobytes() for request in MIXED]


def test_a_request_has_the_same_bytes_beside_neighbours_of_other_settings(
    sampler: Sampler, alone: list[bytes]
) -> None:
    together = sampler.sample_requests(MIXED)
    assert [sample[None].tobytes() for sample in together] == alone


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_request_has_the_same_bytes_anywhere_in_a_batch_of_16(
    sampler: Sampler, alone: list[bytes], place: int
) -> None:
    crowd = [Request(seed=100 + i, label=i % 10, guidance=2.0, steps=5) for i in range(16)]
    for request, expected in zip(MIXED, alone, strict=True):
        crowd[place] = request
        assert sampler.sample_requests(crowd)[place].tobytes() == expected


def test_different_requests_have_different_bytes(alone: list[bytes]) -> None:
    assert len(set(alone)) == len(MIXED)


def test_sample_i_is_seed_plus_i_in_chunks_of_any_size(tiny_bundle: Path, sampler: Sampler) -> None:
    five = sampler.sample(5, seed=40, label=2, steps=4)
    chunked = Sampler.load(tiny_bundle, max_batch=2).sample(5, seed=40, label=2, steps=4)
    assert chunked.tobytes() == five.tobytes()
    assert sampler.sample(2, seed=[44, 41], label=2, steps=4).tobytes() == five[[4, 1]].tobytes()


def test_eight_threads_get_the_bytes_of_one(sampler: Sampler, alone: list[bytes]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda i: sampler.sample_requests([MIXED[i % len(MIXED)]]).tobytes(), range(48)
            )
        )
    assert found == [alone[i % len(MIXED)] for i in range(48)]


def test_samples_are_float32_in_the_datas_range_and_pictures_uint8(sampler: Sampler) -> None:
    samples = sampler.sample(3, seed=1, steps=5)
    assert samples.dtype == np.float32
    assert samples.shape == (3, 1, 8, 8)
    assert samples.min() >= -1
    assert samples.max() <= 1
    pictures = sampler.pictures(3, seed=1, steps=5)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, 8, 8, 1)


def test_a_label_goes_by_name_or_number(sampler: Sampler) -> None:
    by_number = sampler.sample(2, label=[5, 6], steps=3)
    assert by_number.tobytes() == sampler.sample(2, label=["5", "6"], steps=3).tobytes()
    assert by_number.tobytes() == sampler.sample(2, label=np.array([5, 6]), steps=3).tobytes()
    assert by_number[0].tobytes() != sampler.sample(1, label=6, steps=3).tobytes()


def test_guidance_of_one_is_the_plain_network_to_the_bit_in_the_guided_graph_too(
    sampler: Sampler,
) -> None:
    """Run a row of guidance 1 through both graphs by hand."""
    found = []
    for guided in (False, True):
        buffers = sampler.backend.bind(2)
        buffers.state[:] = np.linspace(-1, 1, buffers.state.size, dtype=np.float32).reshape(
            buffers.state.shape
        )
        program = sampler.bundle.program("ddim", 3)
        buffers.call[:], buffers.update[:], buffers.label[:] = (
            program.call[1],
            program.update[1],
            (3, 8),
        )
        buffers.step(guided)
        found.append(buffers.state.tobytes() + buffers.denoised.tobytes())
    assert found[0] == found[1]


def test_rows_without_guidance_never_pay_for_it(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int]] = []
    run = OnnxRuntimeBuffers.run

    def counted(self: OnnxRuntimeBuffers, guided: bool, first: int, count: int) -> None:
        calls.append((guided, count))
        run(self, guided, first, count)

    monkeypatch.setattr(OnnxRuntimeBuffers, "run", counted)
    sampler.sample(3, label=[1, 2, None], guidance=[1.0, 2.0, 3.0], steps=2)
    assert calls == [(False, 2), (True, 1)] * 2, (
        "the plain label and the null label go together, the guided one alone"
    )


def test_no_label_is_the_null_label_if_it_was_trained_and_refused_if_not(
    sampler: Sampler, edited
) -> None:
    assert np.isfinite(sampler.sample(1, steps=2)).all()
    untrained = Sampler.load(edited(lambda v: v["labels"].update(null_trained=False)))
    with pytest.raises(RequestError, match="trained with labels only"):
        untrained.sample(1, steps=2)
    with pytest.raises(RequestError, match="cannot be guided"):
        untrained.sample(1, label=1, guidance=2.0, steps=2)
    assert untrained.sample(1, label=1, steps=2).shape == (1, 1, 8, 8), (
        "the bundle's own default guidance is dropped, not refused"
    )


def test_the_callback_sees_every_step_and_ends_at_the_result(sampler: Sampler) -> None:
    seen: list[Preview] = []
    found = sampler.sample(3, label=1, steps=4, on_step=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(p.samples.tolist() == [0, 1, 2] for p in seen)
    np.testing.assert_array_equal(seen[-1].denoised, found)  # the step onto sigma = 0 is x = D


def test_the_callback_names_samples_across_chunks_and_leaves_out_finished_ones(
    tiny_bundle: Path,
) -> None:
    seen: list[Preview] = []
    requests = [Request(seed=i, label=1, steps=1 + i) for i in range(3)]
    Sampler.load(tiny_bundle, max_batch=2).sample_requests(requests, seen.append)
    assert [(p.samples.tolist(), p.step, p.steps) for p in seen] == [
        ([0, 1], 1, 2),
        ([1], 2, 2),
        ([2], 1, 3),
        ([2], 2, 3),
        ([2], 3, 3),
    ]


def test_the_callback_can_cancel_and_the_sampler_goes_on_working(sampler: Sampler) -> None:
    before = sampler.sample(2, label=1, steps=4).tobytes()
    with pytest.raises(Cancelled, match="after step 2 of 4"):
        sampler.sample(2, label=1, steps=4, on_step=lambda preview: preview.step < 2)
    assert sampler.sample(2, label=1, steps=4).tobytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "`n` must be 1 to 1000000, got 0"),
        ({"n": -3}, "`n` must be 1 to 1000000"),
        ({"n": 1.0}, "`n` must be an integer, 1 to 1000000, got 1.0"),
        ({"seed": -1}, "`seed` must be 0 to"),
        ({"seed": 2**64}, "`seed` must be 0 to"),
        ({"n": 2, "seed": MAX_SEED}, "`seed` must be 0 to"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": True}, "`seed` must be an integer"),
        ({"seed": "7"}, "`seed` must be an integer"),
        ({"n": 2, "seed": [1, 2, 3]}, "`seed` must be one value or 2 of them, got 3"),
        ({"steps": 0}, "`steps` must be 1 to 1000, got 0. Pass a larger one."),
        ({"steps": -5}, "`steps` must be 1 to 1000"),
        ({"steps": 1001}, "`steps` must be 1 to 1000, got 1001. Pass a smaller one."),
        ({"steps": 2.0}, "`steps` must be an integer"),
        ({"solver": "dimm"}, "unknown solver 'dimm'. Did you mean 'ddim'"),
        ({"grid": "trialing"}, "unknown grid 'trialing'. Did you mean 'trailing'"),
        ({"grid": [1, 2]}, "strictly falling"),
        ({"solver": "ddim", "ete": 1}, "Did you mean 'eta'"),
        ({"solver": "ddim", "eta": 2}, "`eta` must be a number from 0 to 1"),
        ({"solver": "ddim", "eta": [1]}, "`eta` must be a number"),
        ({"label": 10}, "label 10 is out of range"),
        ({"label": -1}, "label -1 is out of range"),
        ({"label": "ten"}, "unknown label 'ten'"),
        ({"label": 1.0}, "`label` must be a name or a number from 0 to 9"),
        ({"label": 1, "guidance": float("nan")}, "`guidance` must be a number"),
        ({"label": 1, "guidance": "2"}, "`guidance` must be a number"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(
    sampler: Sampler, arguments: dict, message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        sampler.sample(**{"steps": 2, **arguments})
    assert message in str(refused.value)


def test_a_request_error_is_a_value_error(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="unknown solver"):
        sampler.sample(1, solver="nothing like it")
