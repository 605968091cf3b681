"""A solver fitted to the tiny network is closer than untuned ones, the same every time, and a
program like any other."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError
from export.proof.trajectories import run_loop_graph
from export.sources.bundle import from_bundle
from export.sources.run import from_run
from export.tune import helps, main, tune, write
from export.tuning import search as tuning
from export.tuning.candidates import even_programs, named_programs
from export.tuning.gauss_newton import (
    LOSSES,
    Fit,
    Form,
    _normal_equations,
    begin,
    errors,
    looked_at,
    rms,
    step,
)
from export.tuning.record import draw_tuned, kept, tuned_checks
from export.tuning.reference import Walker, draw, network_of, probe, same, taught
from export.tuning.search import Settings
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import run
from runtime.errors import BundleError, RequestError
from runtime.files import from_json, to_json
from runtime.sample import main as sample_command
from runtime.sampler import Sampler

FEW = Settings(samples=8, held_out=8, starts=2, tries=1, iterations=3)
CALLS = (3, 5)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def tuned(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, work: Path) -> Bundle:
    """The tiny bundle with solvers of 3 and 5 calls. Read it, do not write it."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("tuned") / "tiny"))
    return tune(Bundle.load(copy), CALLS, settings=FEW, work=work)


@pytest.fixture
def copied(tuned: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned.path, tmp_path / "copy"))


def test_it_is_nearer_than_the_best_untuned_solver_on_samples_it_never_saw(tuned: Bundle) -> None:
    assert sorted(tuned.tuned) == [3, 5]
    for K, found in tuned.tuned.items():
        assert helps(found)
        assert (
            len(found) == K == len(found.program(tuned.schedule, tuned.prediction, clip=tuned.clip))
        )
        held_out = found.made["errors"]["held_out"]
        assert set(held_out["guidance"]) == {"1", "2"}
        assert held_out["rms"] < 0.7 * found.made["untuned"]["held_out"]["rms"]


def test_it_keeps_the_marginals_like_an_untuned_program(tuned: Bundle) -> None:
    program = tuned.program("tuned", 5)
    assert not program.excess.any()
    assert not program.bias.any()
    assert not program.noisy.any()
    np.testing.assert_array_equal(program.moments[-1, 0], (1, 0))


def test_the_report_the_card_and_the_list_of_files_tell_of_it(tuned: Bundle) -> None:
    on_disk = {p.relative_to(tuned.path).as_posix() for p in tuned.path.rglob("*") if p.is_file()}
    assert on_disk == {*tuned.files, MANIFEST}
    for name in tuned.files:
        tuned.read(name)
    curve = from_json(tuned.read("report.json"))["tuned"]
    held_out = tuned.tuned[5].made["errors"]["held_out"]
    assert curve["5"]["tuned"]["rms"] == held_out["rms"] < curve["5"]["untuned"]["rms"]
    assert curve["5"]["tuned"]["guidance"]["2"] == held_out["guidance"]["2"]["rms"]
    assert b"steps=3 | 5" in tuned.read("README.md")
    assert "tuned.png" in tuned.files


def test_a_killed_fit_goes_on_to_the_same_numbers(
    tuned: Bundle, bundle_copy: Path, tmp_path: Path, monkeypatch
) -> None:
    advance, left = tuning.advance, [3]

    def killed(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return advance(*given)

    monkeypatch.setattr(tuning, "advance", killed)
    before = (bundle_copy / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        tune(Bundle.load(bundle_copy), [3], settings=FEW, work=tmp_path / "work")
    assert (bundle_copy / MANIFEST).read_bytes() == before
    left[0] = 99
    monkeypatch.setattr(tuning, "survey", None)  # what was surveyed is not surveyed again
    again = tune(Bundle.load(bundle_copy), [3], settings=FEW, work=tmp_path / "work")
    assert again.tuned[3].to_json() == tuned.tuned[3].to_json()


def test_what_was_fitted_is_applied_to_the_same_network_again_without_a_step(
    tuned: Bundle, bundle_copy: Path, work: Path, monkeypatch
) -> None:
    monkeypatch.setattr(tuning, "advance", None)
    again = tune(Bundle.load(bundle_copy), CALLS, settings=FEW, work=work)
    assert {K: t.to_json() for K, t in again.tuned.items()} == {
        K: t.to_json() for K, t in tuned.tuned.items()
    }


def test_solvers_for_other_numbers_of_calls_stay(copied: Path, tuned: Bundle, work: Path) -> None:
    found = tune(Bundle.load(copied), [2], settings=FEW, work=work)
    assert sorted(found.tuned) == [2, 3, 5]
    assert found.tuned[5].to_json() == tuned.tuned[5].to_json()


def test_files_of_the_user_stay_and_damaged_ones_stay_damaged(copied: Path, tuned: Bundle) -> None:
    bundle = Bundle.load(copied)
    (copied / ".DS_Store").write_text("mine")
    weights = copied / "fp32" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    found = write(bundle, tuned.tuned)
    assert {*found.files} == {*tuned.files}
    assert (copied / ".DS_Store").read_text() == "mine"
    with pytest.raises(BundleError, match="sha256"):
        found.read("fp32/weights.bin")


def test_a_damaged_report_is_found_before_the_search(copied: Path, work: Path) -> None:
    (copied / "report.json").write_text("{}")
    with pytest.raises(BundleError, match=r"report\.json has 2 bytes"):
        tune(Bundle.load(copied), [4], settings=FEW, work=work)


def test_figures_are_drawn_without_pyplot(tuned: Bundle, tmp_path: Path) -> None:
    """Its backend is the caller's, such as a notebook's."""
    import matplotlib

    matplotlib.use("svg")
    draw_tuned(tmp_path, "tiny", tuned_checks(tuned))
    assert matplotlib.get_backend() == "svg"


def test_where_it_does_not_help_nothing_is_written(
    bundle_copy: Path, tmp_path: Path, monkeypatch
) -> None:
    def spoilt(form: Form, walker: Walker, fit: Fit, *_: Any) -> Fit:
        """Like a fit that overfits its samples: good on those only."""
        return dataclasses.replace(
            fit, theta=np.r_[fit.theta[:-1], fit.theta[-1] + 0.5], steps=fit.steps + 1, ended=True
        )

    monkeypatch.setattr(tuning, "step", spoilt)
    before = {p: p.read_bytes() for p in bundle_copy.rglob("*") if p.is_file()}
    with pytest.raises(
        ExportError,
        match=r"does not help on held-out samples.*nothing was written: 3 calls: 0\.\d+ from the "
        r"teacher",
    ):
        tune(Bundle.load(bundle_copy), [3], settings=FEW, work=tmp_path / "work")
    assert {p: p.read_bytes() for p in bundle_copy.rglob("*") if p.is_file()} == before


def test_another_network_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the network is not the one in"):
        tune(Bundle.load(tiny_bundle), [3], lambda x, time, label=None: 0 * x, FEW, tmp_path)


@pytest.mark.parametrize("calls", [1, 65, 2.0])
def test_numbers_of_calls_that_make_no_sense_are_refused(
    tiny_bundle: Path, tmp_path: Path, calls: Any
) -> None:
    with pytest.raises(RequestError, match="`calls` must be"):
        tune(Bundle.load(tiny_bundle), [calls], settings=FEW, work=tmp_path)
    with pytest.raises(RequestError, match="`samples` must be"):
        Settings(samples=0)


def test_the_run_and_the_bundle_are_one_network_and_another_is_not(
    tiny_bundle: Path, tiny_run: Path
) -> None:
    bundle, model = Bundle.load(tiny_bundle), from_run(tiny_run, 2.0)
    ours = probe(network_of(bundle), bundle)
    assert same(ours, probe(model.reference(), model))
    assert same(ours, probe(from_bundle(tiny_bundle).reference(), model))
    assert not same(ours, probe(from_run(tiny_run, 2.0, "weights").reference(), model))


def test_exporting_again_keeps_it_for_the_same_network_alone(
    copied: Path, tuned: Bundle, tiny_run: Path, capsys
) -> None:
    found = kept(from_run(tiny_run, 2.0), copied)
    assert sorted(found) == [3, 5]
    assert from_bundle(copied).tuned[5].to_json() == tuned.tuned[5].to_json()
    assert not capsys.readouterr().out
    assert kept(from_run(tiny_run, 2.0, "weights"), copied) == {}
    assert "has solvers fitted to another network; they are dropped" in capsys.readouterr().out


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_step_graph_the_loop_graph_and_float64_give_the_same_samples(
    tuned: Bundle, tiny_run: Path, guidance: float
) -> None:
    sampler, label, n = Sampler(tuned), np.arange(4) % 10, 4
    found = sampler.sample(n, 7, label=label.tolist(), guidance=guidance, solver="tuned", steps=5)
    x = np.stack([noise(7 + i, Stream.INITIAL, 0, tuned.sample_shape) for i in range(n)])
    program = tuned.program("tuned", 5, guidance=guidance)
    looped = run_loop_graph(tuned, "fp32", program, x, lambda k: x, label)
    np.testing.assert_allclose(looped, found, atol=1e-6)
    double = run(program, _double(tiny_run), x.astype(np.float64), label=label, null_label=10)
    np.testing.assert_allclose(found, double, atol=1e-4)  # float32's rounding through 5 calls


def _double(tiny_run: Path) -> Any:
    """The run's network in float64."""
    import torch

    module = from_run(tiny_run, 2.0).module.double()
    return lambda *given: (
        module(*(torch.from_numpy(np.ascontiguousarray(v)) for v in given)).detach().numpy()
    )


def test_guidance_in_an_interval_and_a_mixed_batch_work(tuned: Bundle) -> None:
    sampler = Sampler(tuned)
    how = {"label": 3, "solver": "tuned", "steps": 5}
    plain, guided = (sampler.sample(2, 0, guidance=g, **how) for g in (1.0, 3.0))
    inside = sampler.sample(2, 0, guidance=3.0, guidance_interval=(0.5, 2.0), **how)
    assert len({plain.tobytes(), guided.tobytes(), inside.tobytes()}) == 3
    mixed = sampler.sample(2, 0, guidance=[1.0, 3.0], **how)
    np.testing.assert_array_equal(mixed, np.stack([plain[0], guided[1]]))
    painted = sampler.inpaint(plain, np.ones(tuned.sample_shape[1:], np.uint8), **how)
    np.testing.assert_array_equal(painted, plain)


def test_without_a_number_of_steps_it_is_that_of_the_most_calls(tuned: Bundle) -> None:
    np.testing.assert_array_equal(tuned.program("tuned").update, tuned.program("tuned", 5).update)
    default = dataclasses.replace(
        tuned, defaults=dataclasses.replace(tuned.defaults, solver="tuned", steps=3)
    )
    assert len(default.program()) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": 4}, "must be one of 3, 5, .*fitted, got 4"),
        ({"steps": True}, "`steps` must be an integer, .*got True"),
        ({"steps": 5, "grid": "trailing"}, "uses its own levels.*got a grid"),
        ({"steps": 5, "strength": 0.5}, "got strength"),
        ({"steps": 5, "up": True}, "got a way up"),
        ({"steps": 5, "eta": 0.5}, "got eta"),
    ],
)
def test_what_a_tuned_solver_cannot_do_is_refused(
    tuned: Bundle, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tuned.program("tuned", **asked)


def test_a_bundle_without_says_how_to_make_one(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"has no tuned solver.*python -m export\.tune"):
        Bundle.load(tiny_bundle).program("tuned", 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"5": 3}),
        lambda t: t.update({"-5": t["5"]}),
        lambda t: t.update({"6": t["5"]}),
        lambda t: t["5"].update(time="abcde"),
        lambda t: t["5"].update(time=[5, 4, 3, 2, 1e306]),
        lambda t: t["5"].update(time=[5, 4, 4, 2, 1]),
        lambda t: t["5"].update(time=[2000, 4, 3, 2, 1]),
        lambda t: t["5"].update(time=[True, 4, 3, 2, 1]),
        lambda t: t["5"].update(time=[10**400, 4, 3, 2, 1]),
        lambda t: t["5"].update(weights=[[0, 0, 0]] * 4),
        lambda t: t["5"].update(weights=[[0, 0]] * 5),
        lambda t: t["5"].update(weights=[[1e9, 0, 0]] * 5),
        lambda t: t["5"].update(weights=[[0.5, 0, 0]] * 5),  # the first row has nothing to remember
        lambda t: t["5"].update(weights=[[None, 0, 0]] * 5),
        lambda t: t["5"].pop("made"),
        lambda t: t["5"].update(made=[]),
    ],
)
def test_hostile_values_are_refused_when_the_bundle_is_read(copied: Path, change: Any) -> None:
    value = from_json((copied / MANIFEST).read_bytes())
    change(value["tuned"])
    (copied / MANIFEST).write_text(to_json(value))
    with pytest.raises(BundleError, match=r"tuned solver .* is none"):
        Bundle.load(copied)


@pytest.mark.parametrize(
    "made", [{}, {"errors": 3, "untuned": {}}, {"network": "no", "errors": {"held_out": []}}]
)
def test_a_record_that_makes_no_sense_is_an_error_to_the_exporter_too(
    tuned: Bundle, made: Any
) -> None:
    spoilt = dataclasses.replace(tuned, tuned={5: dataclasses.replace(tuned.tuned[5], made=made)})
    with pytest.raises(BundleError, match="does not say how it was made"):
        tuned_checks(spoilt)


@pytest.mark.parametrize("value", [[], None, "6"])
def test_tuned_that_is_no_object_is_refused(edited, value: Any) -> None:
    with pytest.raises(BundleError, match="'tuned' is"):
        Bundle.load(edited(lambda v: v.update(tuned=value)))


def test_the_form_holds_every_untuned_program_that_it_starts_from(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    for K in (2, 4, 6):
        form, programs = Form(bundle, K), named_programs(bundle, K) | even_programs(bundle, K)
        assert len(programs) > 50
        for program in programs.values():
            call, update = form.table(form.vector(program))
            np.testing.assert_allclose(call[:, :5], program.call[:, :5], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(update[:, 0], program.update[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_walk_is_the_reference_loop_and_a_step_goes_down_the_true_slope(
    loss: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.load(tiny_bundle)
    walker, form = Walker(network_of(bundle), bundle.num_classes), Form(bundle, 4)
    samples = taught(bundle, walker, draw(bundle, 6, 0), tmp_path, "a")
    program = bundle.program("unipc", 4, "log_snr(4)", order=3, guidance=2.0)
    table, guided = (program.call, program.update), samples.guidance == 2
    found = walker.walk(*table, samples)
    expected = run(
        program, walker.network, samples.x[guided], label=samples.label[guided], null_label=10
    )
    np.testing.assert_allclose(found[guided], expected, atol=1e-5)

    theta, scale = form.vector(program), 0.1
    H, gradient = _normal_equations(form, walker, theta, samples, scale, loss)
    target = looked_at(samples.target, loss)

    def apart(theta):
        return looked_at(walker.walk(*form.table(theta), samples), loss) - target

    r = apart(theta)
    columns = []
    for e in np.diag(form.steps):  # whole walks; the fit resumes from the first row that moves
        columns.append((apart(theta + e) - r) / e.sum())
    J, w = np.stack(columns), 1 / (1 + (r**2).mean(1) / scale**2) / r.size
    np.testing.assert_allclose(H, np.einsum("n,pni,qni->pq", w, J, J), atol=1e-3 * H.max())
    np.testing.assert_allclose(
        gradient, np.einsum("n,pni,ni->p", w, J, r), atol=1e-3 * np.abs(gradient).max()
    )

    before = begin(form, walker, theta, samples, loss)
    after = step(form, walker, before, samples, scale, loss)
    assert after.loss(scale) < 0.8 * before.loss(scale)
    np.testing.assert_array_equal(
        after.error, errors(walker, form.table(after.theta), samples, loss)
    )


def test_contrast_tells_a_blurred_sample_from_one_whose_detail_lies_elsewhere() -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16))
    elsewhere, blurred = np.roll(x, 1, -1), 0 * x
    away = {
        loss: [rms(looked_at(other, loss) - looked_at(x, loss)) for other in (elsewhere, blurred)]
        for loss in LOSSES
    }
    assert away["pixels"][1] < 0.8 * away["pixels"][0]
    assert away["contrast"][1] > 1.2 * away["contrast"][0]


def test_a_loss_is_refused_that_is_unknown_or_cannot_see_the_samples(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="Did you mean 'contrast'"):
        Settings(loss="contrasts")
    flat = dataclasses.replace(Bundle.load(tiny_bundle), sample_shape=(64,))
    with pytest.raises(RequestError, match=r"3×3 pixels, got \(64,\). Use pixels"):
        tuning.prepare(
            flat, lambda *_: None, [], dataclasses.replace(FEW, loss="contrast"), tmp_path
        )


def test_pictures_are_fitted_by_contrast_and_told_in_pixels(
    tuned: Bundle, bundle_copy: Path, work: Path
) -> None:
    assert tuned.tuned[3].made["settings"]["loss"] == "contrast"
    found = tune(
        Bundle.load(bundle_copy), [3], settings=dataclasses.replace(FEW, loss="pixels"), work=work
    ).tuned[3]
    assert found.made["settings"]["loss"] == "pixels"
    assert found.made["untuned"] == tuned.tuned[3].made["untuned"]
    assert helps(found)


def test_samples_that_are_no_pictures_are_fitted_by_pixels(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    flat = dataclasses.replace(Bundle.load(tiny_bundle), sample_shape=(64,))
    assert tuning.prepare(flat, lambda x, *_: x, [], FEW, tmp_path).settings.loss == "pixels"


def test_the_command_fits_and_the_sampler_samples_it(
    bundle_copy: Path, tiny_run: Path, tmp_path: Path, capsys
) -> None:
    few = [f"--{name.replace('_', '-')}={value}" for name, value in vars(FEW).items()]
    given = [
        str(bundle_copy),
        "--calls",
        "3",
        "--run",
        str(tiny_run),
        "--work",
        str(tmp_path / "work"),
        *few,
    ]
    assert main(given) == 0
    assert "3 calls: 0." in capsys.readouterr().out
    out = tmp_path / "grid.png"
    assert (
        sample_command(
            [str(bundle_copy), "--n", "4", "--solver", "tuned", "--steps", "3", "--out", str(out)]
        )
        == 0
    )
    assert out.exists()
    assert (
        sample_command([str(bundle_copy), "--solver", "tuned", "--steps", "4", "--out", str(out)])
        == 2
    )
    assert "`steps` must be one of 3, for which" in capsys.readouterr().err
    assert main([str(tmp_path), "--calls", "3"]) == 2
