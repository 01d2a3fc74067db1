"""Tell the user of images that a trainer would not take from a cache, because it expects them in another size."""

from collections.abc import Callable, Sequence

from latent_codec.latents.format import LatentsEntry


def size_notes(entries: Sequence[LatentsEntry], program: str, step: int, buckets: str) -> list[str]:
    """Return a sentence each for images whose size is no bucket's, and for images that EXIF turns.

    A side of a bucket is a multiple of `step`; `buckets` is what `encode --buckets` takes for it.
    """
    odd = _listed(entries, lambda entry: entry.geometry.width % step > 0 or entry.geometry.height % step > 0)
    turned = _listed(entries, lambda entry: entry.geometry.stored_size != entry.geometry.original_size)
    notes: list[str] = []
    if odd:
        notes.append(
            f"{odd} of a size that is no bucket of {program}, whose sides are multiples of {step}: the trainer would "
            f"encode them again, or end at a batch of several sizes; encode with --buckets {buckets}"
        )
    if turned:
        notes.append(
            f"{turned} turned by EXIF, which {program} ignores: the trainer expects latents of the pixels as they are "
            "stored, in another bucket than the upright latents; turn the pixels of the files and encode again"
        )
    return notes


def _listed(entries: Sequence[LatentsEntry], is_one: Callable[[LatentsEntry], bool]) -> str:
    """Return "3 images, such as a.png (481x321), are", or nothing if there is none."""
    found = [entry for entry in entries if is_one(entry)]
    if not found:
        return ""
    example = f"{found[0].path} ({found[0].geometry.width}x{found[0].geometry.height})"
    return f"1 image, {example}, is" if len(found) == 1 else f"{len(found)} images, such as {example}, are"
