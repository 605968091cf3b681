"""The readable files of a bundle: the report, its figures, an image of samples, the model card."""

from __future__ import annotations

from dataclasses import replace

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import REPORT_IMAGE, SAMPLES_IMAGE
from runtime.bundle.spec import ModelSpec
from runtime.images import UInt8, is_image, save, tile
from runtime.sampler import Sampler

from ..sources.model import versions
from ..tuning.record import draw_tuned, tuned_checks
from .card import card, sheet_settings
from .check import Proof
from .figure import draw
from .folder import write_card, write_manifest, write_report

SHEET_WIDTH = 512
"""The card's image is enlarged to at least this many pixels."""


def write_documents(name: str, model: ModelSpec, bundle: Bundle, proof: Proof) -> None:
    """Write the documents of a bundle, then bundle.json over all files.

    Args:
        name: The name of the folder, which the card's example loads.
        model: What was exported; it draws the conditions of the card's samples.
        bundle: The bundle in memory, whose graphs are written.
        proof: What was compared.

    Raises:
        BundleError: A user could not load the bundle.
    """
    folder = bundle.path
    report = replace(proof.report, versions=versions(), tuned=tuned_checks(bundle))
    write_report(folder, report.to_json())
    draw(folder / REPORT_IMAGE, bundle, proof)
    if report.tuned:
        draw_tuned(folder, bundle.name, report.tuned)
    # The samples are drawn as a user will draw them, so the bundle must state its precisions first.
    bundle = replace(bundle, report=report.summary(), same_bytes=report.same_bytes)
    if is_image(bundle.sample_shape):
        save(folder / SAMPLES_IMAGE, _sheet(model, bundle, report.plan.samples), least=SHEET_WIDTH)
    write_card(folder, card(replace(bundle, name=name)))
    # Last, because bundle.json lists every file with its hash.
    write_manifest(bundle)


def _sheet(model: ModelSpec, bundle: Bundle, most: int) -> UInt8:
    """Return samples for the model card on one sheet [H, W, C], one column per label."""
    classes = min(bundle.num_classes, most)
    count = classes * (most // classes) if classes else min(16, most)
    # As many columns as divide the classes, so that a column has one label from top to bottom.
    columns = max((c for c in range(4, 13) if classes and classes % c == 0), default=None)
    labels = [i % classes for i in range(count)] if classes else None
    sampler = Sampler(bundle)
    conditions = model.draw_conditions(count)
    settings = sheet_settings(bundle)
    return tile(sampler.pictures(count, label=labels, conditions=conditions, **settings), columns)
