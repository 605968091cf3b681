"""A bundle is read complete and unchanged, or raises an error that says what to do."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import Bundle, BundleError, RequestError, Sampler
from runtime.bundle import hub
from runtime.bundle.distilled import Distilled
from runtime.bundle.format import MANIFEST
from runtime.bundle.rules import MAX_MANIFEST
from runtime.diffusion.solvers import SOLVERS


def test_the_bundle_says_what_it_is(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    assert bundle.sample_shape == (1, 8, 8)
    assert bundle.precisions == ("fp32",)
    assert bundle.labels is not None
    assert bundle.labels.names == tuple("0123456789")
    assert len(bundle.schedule) == 1000
    assert bundle.provenance["config"]["data"] == "digits"


def test_a_network_that_was_distilled_is_called_at_its_levels_alone(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    times = tuple(bundle.schedule.time[[999, 738, 500]].tolist())
    student = replace(bundle, distilled=Distilled({1: times[:1], 3: times}, {}))
    for solver in SOLVERS:
        called = bundle.program(solver, grid=times).call[:, 0].tolist()
        if set(called) <= set(times):
            assert student.program(solver, 3).call[:, 0].tolist() == called
        else:
            with pytest.raises(RequestError, match=f"{solver} calls the network between"):
                student.program(solver, 3)
            # Times of one's own are taken as they are.
            student.program(solver, grid=times[:2])
    with pytest.raises(RequestError, match="between the levels"):
        student.program("dpmpp_2s", 3)


def test_a_bundle_is_a_line_in_a_notebook(tiny_bundle: Path) -> None:
    assert repr(Bundle.load(tiny_bundle)) == f"<Bundle tiny: 1×8×8, fp32, at {tiny_bundle}>"


def test_every_file_is_listed_and_reads_back(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    on_disk = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert on_disk == {*bundle.files, MANIFEST}
    for name, file in bundle.files.items():
        assert len(bundle.read(name)) == file.size


@pytest.mark.parametrize("name", ["fp32/step.onnx", "fp32/step_guided.onnx", "fp32/weights.bin"])
def test_a_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} cannot be read: No such file"):
        Sampler.load(bundle_copy).sample(1, label=1, guidance=2.0, steps=1)


@pytest.mark.parametrize("name", ["fp32/step.onnx", "fp32/step_guided.onnx", "fp32/weights.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_changed_byte_and_a_cut_file_are_found(bundle_copy: Path, name: str, damage: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(
        BundleError, match="changed or damaged" if damage == "flip" else "bytes, .* expected"
    ):
        Sampler.load(bundle_copy).sample(1, label=1, guidance=2.0, steps=1)


def test_a_newer_format_is_refused_with_advice(edited) -> None:
    with pytest.raises(BundleError, match=r"format 3, newer than 2.*pip install -U"):
        Bundle.load(edited(lambda v: v.update(format=3)))


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "fp32/../../secret", "a//b", "C:\\x", ".hidden", "a/./b", ""],
)
def test_a_path_that_leaves_the_folder_is_refused(edited, name: str) -> None:
    with pytest.raises(BundleError, match="not a plain path"):
        Bundle.load(edited(lambda v: v["files"].update({name: {"sha256": "0" * 64, "size": 1}})))


def test_a_link_that_leaves_the_folder_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (bundle_copy / "fp32/weights.bin").rename(outside)
    os.symlink(outside, bundle_copy / "fp32/weights.bin")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Sampler.load(bundle_copy)


def _set(*path: str, to: object):
    def change(value: dict) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("prediction", to="noise"), "'prediction' is 'noise'"),
        (_set("clip", to=-1), "'clip' is -1, a number above 0, or null expected"),
        (_set("clip", to=True), "'clip' is True"),
        (_set("sample", "shape", to=[1, 8, 0]), "'shape' is [1, 8, 0]"),
        (_set("sample", "shape", to=[10**6] * 4), "'shape' is"),
        (_set("sample", to=None), "'shape' is missing"),
        (_set("sample", "range", to=[1, -1]), "'range' is [1, -1]"),
        (_set("defaults", "steps", to=0), "'steps' is 0"),
        (_set("defaults", "guidance", to="2"), "'guidance' is '2'"),
        (_set("labels", "names", to=["a", "a"]), "'names' is ['a', 'a']"),
        (_set("labels", "null_trained", to=1), "'null_trained' is 1"),
        (_set("schedule", "alpha", to=[0.5]), "'schedule' is not one"),
        (_set("schedule", "name", to="cosin"), "Did you mean 'cosine'"),
        (
            _set("schedule", "parameters", to={"T": 1000, "s": 0.1}),
            "is not what its name and parameters give",
        ),
        (_set("schedule", to=None), "'schedule' is None"),
        (_set("files", "fp32/step.onnx", to={"sha256": "xyz", "size": -1}), "'sha256' is 'xyz'"),
        (lambda v: v.pop("provenance"), "'provenance' is missing"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(edited, change, message: str) -> None:
    with pytest.raises(BundleError) as refused:
        Bundle.load(edited(change))
    assert message in str(refused.value)


def test_all_faults_are_told_at_once(edited) -> None:
    with pytest.raises(BundleError, match=r"'name' is missing.*'clip' is 0"):
        Bundle.load(edited(lambda v: (v.pop("name"), v.update(clip=0))))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": NaN}',
        '{"format": 1, "format": 1}',
        "[" * 100_000,
        '{"format": true}',
    ],
)
def test_what_is_no_bundle_json_is_refused(bundle_copy: Path, text: str) -> None:
    (bundle_copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"cannot be read as JSON|is not a bundle's"):
        Bundle.load(bundle_copy)


def test_nan_in_the_schedule_is_not_json(bundle_copy: Path) -> None:
    manifest = bundle_copy / MANIFEST
    head, _, tail = manifest.read_text().partition('"alpha": [')
    manifest.write_text(head + '"alpha": [NaN,' + tail.partition(",")[2])
    with pytest.raises(BundleError, match="NaN is not JSON"):
        Bundle.load(bundle_copy)


def test_a_folder_that_is_no_bundle_and_a_path_that_is_no_folder_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        Bundle.load(tmp_path)
    with pytest.raises(BundleError, match=r"is not a folder.*export\.build"):
        Bundle.load(tmp_path / "nowhere")


def test_a_graph_that_is_no_onnx_is_a_bundle_error_even_with_matching_hashes(
    bundle_copy: Path, edited
) -> None:
    import hashlib

    (bundle_copy / "fp32/step.onnx").write_bytes(b"not onnx")
    entry = {"sha256": hashlib.sha256(b"not onnx").hexdigest(), "size": 8}
    with pytest.raises(BundleError, match="onnxruntime cannot load it"):
        Sampler.load(edited(_set("files", "fp32/step.onnx", to=entry)))


def test_the_schedule_reads_back_to_the_bit(tiny_bundle: Path) -> None:
    from runtime import make_schedule

    found, made = Bundle.load(tiny_bundle).schedule, make_schedule("cosine")
    for name in ("alpha", "sigma", "time"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))


def test_a_bundle_is_read_after_the_process_has_changed_its_folder(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    bundle = Bundle.load(tiny_bundle.name)
    expected = Sampler(bundle).sample(1, label=1, guidance=2.0, steps=2)
    loaded = Sampler(bundle)
    monkeypatch.chdir(tmp_path)
    # The guided graph is read at the first guided row.
    assert loaded.sample(1, label=1, guidance=2.0, steps=2).tobytes() == expected.tobytes()


def test_a_report_that_refuses_the_bundle_itself_is_damage(edited) -> None:
    def missed(value: dict) -> None:
        value["report"]["fp32"]["onnxruntime"]["missed"] = 1

    with pytest.raises(BundleError, match="fp32 missed its bounds on onnxruntime"):
        Bundle.load(edited(missed))


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_bundle_of_the_first_release_gives_the_samples_that_it_gave(
    first_release: Path, solver: str
) -> None:
    sampler = Sampler.load(first_release / "bundle", backend="onnxruntime")
    samples = sampler.sample(4, seed=7, label=3, guidance=2.0, steps=8, solver=solver)
    with np.load(first_release / "samples.npz") as stored:
        # On the machine that made them the bytes are equal. Elsewhere kernels round differently:
        # two libraries on that machine differ by 8e-7, and other noise or another program by 0.1.
        np.testing.assert_allclose(samples, stored[solver], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("figure", "value"),
    [("ms_a_call", 5), ("answer", {"1": 0.5}), ("psnr_db", {}), ("missed", {})],
)
def test_a_figure_of_another_kind_is_damage(edited, figure: str, value: object) -> None:
    """`runtime.info` and backend="fastest" compute with it."""
    with pytest.raises(BundleError, match=r"'report' is .* figures by precision and backend"):
        Bundle.load(edited(_set("report", "fp32", "onnxruntime", figure, to=value)))


def test_a_default_guidance_that_cannot_be_is_found_at_once(edited) -> None:
    with pytest.raises(BundleError, match=r"'defaults' cannot be sampled with: `guidance` must be"):
        Bundle.load(edited(_set("defaults", "guidance", to=5000)))


@pytest.mark.parametrize("half", [b'"\\ud800"', b'"\xed\xa0\x80"'])
def test_a_name_that_is_no_text_is_refused(bundle_copy: Path, half: bytes) -> None:
    """It has no bytes, and so the bundle would have no hash."""
    manifest = bundle_copy / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"tiny"', half))
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.load(bundle_copy)


@pytest.mark.parametrize("name", [MANIFEST, "fp32/step.onnx"])
@pytest.mark.parametrize("kind", ["circle", "pipe", "folder", "outside"])
def test_what_is_no_file_of_the_folder_is_refused(
    bundle_copy: Path, tmp_path: Path, kind: str, name: str
) -> None:
    path = bundle_copy / name
    path.rename(tmp_path / "outside")
    makes = {
        "circle": lambda: path.symlink_to(path.name),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "outside": lambda: path.symlink_to(tmp_path / "outside"),
    }
    makes[kind]()
    with pytest.raises(BundleError, match=r"cannot be read|not a regular file|leads out of"):
        Bundle.load(bundle_copy).read(name)


def test_a_bundle_json_of_any_size_is_not_read(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / MANIFEST, MAX_MANIFEST + 1)
    with pytest.raises(BundleError, match="268435457 bytes, at most 268435456"):
        Bundle.load(bundle_copy)


def test_the_store_of_a_snapshot_may_not_be_a_link(bundle_copy: Path, tmp_path: Path) -> None:
    """A file that differs from bundle.json is removed from the store: it could be any file."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    bundle_copy.rename(snapshot)
    (snapshot.parents[1] / "blobs").symlink_to(private)
    (snapshot / "fp32/weights.bin").unlink()
    (snapshot / "fp32/weights.bin").symlink_to(private / "key")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.load(snapshot).read("fp32/weights.bin")
    assert (private / "key").read_text() == "secret"


def test_a_damaged_bundle_json_in_the_hubs_cache_is_fetched_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / MANIFEST).write_text("{")

    def fetch(repo: str, file: str, **_: object) -> str:
        if not (snapshot / file).exists():
            (snapshot / file).parent.mkdir(exist_ok=True)
            (snapshot / file).write_bytes((tiny_bundle / file).read_bytes())
        return str(snapshot / file)

    monkeypatch.setattr(hub, "hub_library", lambda: SimpleNamespace(hf_hub_download=fetch))
    with pytest.raises(BundleError, match=r"cannot be read as JSON .* Load the bundle again"):
        Bundle.load("hf:a/b")
    assert Bundle.load("hf:a/b").name == "tiny"
