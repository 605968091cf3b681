"""What a run and a bundle state about the data that a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataRecord:
    """The entry `data_record` of config.json. A run resumes only if it is still the same.

    Attributes:
        name: What the data is called.
        pictures: The number of images.
        fingerprint: A sha256 that changes with the data.
        licence: The licence of the images, or "not stated".
        note: One phrase for the model card.
    """

    name: str
    pictures: int
    fingerprint: str
    licence: str
    note: str

    def to_json(self) -> dict[str, str | int]:
        return {
            "name": self.name,
            "pictures": self.pictures,
            "fingerprint": self.fingerprint,
            "licence": self.licence,
            "note": self.note,
        }
