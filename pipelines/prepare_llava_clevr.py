"""LLaVA conversations with images as the parquet that `actcache run data=llava` reads.

    python -m pipelines.prepare_llava_clevr --push_to_hub \\
        --hf_repo_path lmms-lab/LLaVA-OneVision-Data --subset "CLEVR-Math(MathV360K)" \\
        --split train --target_hf_repo_path NAME/LLaVA-OneVision-Data-SAE

In: `image` (one, a list, or none) and `conversations`, a list of {from, value} with `<image>`
where an image is shown. Out: `images`, a list of {bytes, path}, and `text`, a list of
{role, content}, each content a list of {"type": "image"} and {"type": "text", "text": …}. An image
stands where its `<image>` stood, and its bytes are not touched. Images that no `<image>` shows come
first in the first question. What cannot be converted is an error that names the row.

`--hf_repo_path` may be a local folder. Rows are streamed: memory holds one row group.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}
PLACEHOLDER = "<image>"
ROW_GROUP = 64


class PrepareError(Exception):
    """The data cannot be converted; the message says which row and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for data or uploads that fail, 2 for wrong usage."""
    options = _parse(argv)
    try:
        rows, unplaced = convert(options)
    except PrepareError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"{options.local_path}: {rows:,} rows")
    if unplaced:
        print(f"in {unplaced:,} of them no {PLACEHOLDER} says where: the images come first")
    return _upload(options) if options.push_to_hub else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.prepare_llava_clevr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hf_repo_path", default="lmms-lab/LLaVA-OneVision-Data", help="repository, or a folder")
    add("--subset", default=None, help="such as 'CLEVR-Math(MathV360K)'; a subfolder of a folder")
    add("--split", default="train")
    add("--local_path", type=Path, default=Path("data/llava_ov_clevr.parquet"), help="the result")
    add("--push_to_hub", action="store_true", help="upload the result too")
    add("--target_hf_repo_path", default=None, help="data set repository to upload to")
    add("--images_key", default="images", help="column of the images (images)")
    add("--text_key", default="text", help="column of the messages (text)")
    add("--max_samples", type=int, default=None, help="rows to convert at most")
    options = parser.parse_args(argv)
    if options.push_to_hub and not options.target_hf_repo_path:
        parser.error("--push_to_hub needs --target_hf_repo_path NAME/DATASET to upload to")
    if options.max_samples is not None and options.max_samples < 1:
        parser.error(f"--max_samples: expected at least 1, got {options.max_samples}")
    if options.target_hf_repo_path and not options.push_to_hub:
        print("--target_hf_repo_path has no effect without --push_to_hub", file=sys.stderr)
    return options


# -- converting ------------------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> tuple[int, int]:
    """Write the result; rows, and how many of them have images that no placeholder shows.

    The file appears under its name when it is whole. Raises PrepareError.
    """
    schema = _schema(options.images_key, options.text_key)
    target: Path = options.local_path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    rows = unplaced = 0
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            numbered = tqdm(islice(_rows(options), options.max_samples), unit="row", delay=2)
            found = (converted(row, number) for number, row in enumerate(numbered))
            while group := list(islice(found, ROW_GROUP)):
                columns = [[images for images, _, _ in group], [text for _, text, _ in group]]
                arrays = [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))
                rows, unplaced = rows + len(group), unplaced + sum(u for _, _, u in group)
        if not rows:
            raise PrepareError(f"{options.hf_repo_path}: split {options.split} has no rows")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return rows, unplaced


def _schema(images: str, text: str) -> pa.Schema:
    """With the types that `datasets` shows: images as images."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    return Features({images: List(Image()), text: List(message)}).arrow_schema


def _rows(options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    """Rows of the source, images as bytes."""
    import datasets

    path, subset = options.hf_repo_path, options.subset
    if Path(path).is_dir() and subset and (Path(path) / subset).is_dir():
        path, subset = str(Path(path) / subset), None
    try:
        stream = datasets.load_dataset(path, subset, split=options.split, streaming=True)
        yield from stream.decode(False)
    except (OSError, ValueError, RuntimeError) as e:
        raise PrepareError(
            f"--hf_repo_path {options.hf_repo_path} --subset {options.subset} "
            f"--split {options.split} cannot be read: {e}"
        ) from e


def converted(
    row: Mapping[str, Any], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Images and messages of a row, and whether no placeholder shows the images. PrepareError."""
    missing = {"conversations"} - set(row)
    if missing or not ({"image", "images"} & set(row)):
        raise PrepareError(
            f"row {number}: expected columns image and conversations, it has {', '.join(row)}"
        )
    cell = row["image"] if "image" in row else row["images"]
    images = [_image(i, number) for i in (cell if isinstance(cell, list) else [cell]) if i]
    turns = [_turn(turn, number) for turn in row["conversations"] or []]
    shown = sum(text.count(PLACEHOLDER) for _, text in turns)
    unplaced = bool(images) and not shown
    if shown != len(images) and not unplaced:
        raise PrepareError(
            f"row {number} has {len(images)} images and {shown} {PLACEHOLDER} in its conversations"
        )
    messages: list[dict[str, Any]] = [{"role": r, "content": _parts(text)} for r, text in turns]
    if unplaced:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise PrepareError(
                f"row {number} has {len(images)} images and no question to show them"
            )
        first["content"] = [_part(None)] * len(images) + first["content"]
    return images, messages, unplaced


def _turn(turn: Any, number: int) -> tuple[str, str]:
    """Role and text of a turn."""
    who = turn.get("from") if isinstance(turn, Mapping) else None
    if who not in ROLES or not isinstance(turn.get("value"), str):
        raise PrepareError(
            f"row {number}: expected turns {{from, value}} of {', '.join(ROLES)}, got {turn!r:.120}"
        )
    return ROLES[who], turn["value"]


def _parts(text: str) -> list[dict[str, Any]]:
    """Text and images in order; the white space around a placeholder belongs to it."""
    pieces = text.split(PLACEHOLDER)
    found: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        found += [_part(None)] if i else []
        bare = piece.strip() if len(pieces) > 1 else piece
        found += [_part(bare)] if bare else []
    return found


def _part(text: str | None) -> dict[str, Any]:
    return {"type": "image", "text": None} if text is None else {"type": "text", "text": text}


def _image(image: Any, number: int) -> dict[str, Any]:
    """An image as {bytes, path}, its file read if there are no bytes."""
    data = image.get("bytes") if isinstance(image, Mapping) else image
    path = image.get("path") if isinstance(image, Mapping) else None
    try:
        if data is None and path is not None:
            data = Path(path).read_bytes()
    except OSError as e:
        raise PrepareError(f"row {number}: its image cannot be read: {e}") from e
    if not isinstance(data, bytes):
        raise PrepareError(f"row {number}: expected an image, got {image!r:.120}")
    return {"bytes": data, "path": None if path is None else Path(path).name}


# -- uploading -------------------------------------------------------------------------------------


def _upload(options: argparse.Namespace) -> int:
    """Put the result into the target repository; its exit status."""
    from huggingface_hub import HfApi

    target, file = options.target_hf_repo_path, options.local_path
    try:
        api = HfApi()
        api.create_repo(target, repo_type="dataset", exist_ok=True)
        api.upload_file(
            path_or_fileobj=file,
            path_in_repo=f"data/{options.split}-00000-of-00001.parquet",
            repo_id=target,
            repo_type="dataset",
        )
    except Exception as e:  # noqa: BLE001 - of hub, HTTP library or disk: it is said, and fails
        print(
            f"error: not uploaded to {target}: {type(e).__name__}: {str(e).strip()}\n"
            f"The converted data is whole and stays at {file.resolve()}. Once that is settled "
            "(hf auth login, a repository you may write to), the same command uploads it, or:\n"
            f"  hf upload {target} {file} --repo-type dataset",
            file=sys.stderr,
        )
        return 1
    print(f"uploaded to https://huggingface.co/datasets/{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
