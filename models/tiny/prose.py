"""English text for training `tiny`, from Debian packages whose text may be freely used and changed.

    python -m models.tiny.prose build/tiny        # needs apt-get and dpkg-deb (Debian 12), a network, 60 MB

writes `prose.txt` (documents parted by a line of one form feed) and `definitions.json` (common nouns and glosses).
The sources and their licences stand in the model card.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

PACKAGES = (
    "python3.11-doc",
    "r-cran-janeaustenr",
    "wordnet-base",
    "wordnet-sense-index",
    "dict-devil",
    "dict-jargon",
    "miscfiles",
)
DOCUMENT_BREAK = "\f"
MIN_DOCUMENT = 200
NUM_DEFINITIONS = 2000


def fetch(package: str, directory: Path) -> Path:
    """Download a package of the configured Debian release and unpack it; its root."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=directory, check=True)
    archive = next(directory.glob(f"{package}_*.deb"))
    root = directory / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def python_documentation(root: Path) -> Iterator[str]:
    """The reStructuredText sources of Python's manual, one document a page, without most of the markup."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(sources.rglob("*.rst.txt")):
        if "changelog" in path.name:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r":[a-z:+-]+:`[!~]?([^`<]*?)(?:\s*<[^>]*>)?`", r"\1", text)
        text = re.sub(r"^\.\. (_.*:|index::.*|sectionauthor::.*|moduleauthor::.*)$", "", text, flags=re.MULTILINE)
        text = re.sub(r"^([=\-*~^#\"+])\1{3,}$", "", text, flags=re.MULTILINE)
        yield re.sub(r"\n{3,}", "\n\n", text).strip()


def austen_novels(root: Path) -> Iterator[str]:
    """Jane Austen's six novels out of the package's database of serialised R objects.

    The file is a row of (big-endian length, byte 'Z' or other, compressed object); a string is the flags word 0x...09,
    its length and its bytes. Each novel is one object whose strings are the printed lines.
    """
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    start = 0
    while start < len(data):
        decompressor = zlib.decompressobj()
        raw = decompressor.decompress(data[start + 4 :])
        start = len(data) - len(decompressor.unused_data)
        lines = list(r_strings(raw))
        text = "\n".join(lines)
        for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+)", text):
            paragraphs = re.split(r"\n\s*\n", chapter)
            yield "\n\n".join(" ".join(part.split()) for part in paragraphs if part.strip())


def r_strings(raw: bytes) -> Iterator[str]:
    """The character strings of a serialised R object (its XDR form)."""
    for match in re.finditer(rb"\x00[\x00-\x0f][\x00-\xff]\x09(?=[\x00-\xff]{4})", raw):
        length = int.from_bytes(raw[match.end() : match.end() + 4], "big")
        if length <= 200:
            yield raw[match.end() + 4 : match.end() + 4 + length].decode("utf-8", errors="replace")


def dictionary(path: Path) -> Iterator[str]:
    """A dictd dictionary, a gzip file, cut into pieces at its headwords."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    pieces = re.split(r"\n(?=\S)", text)
    for start in range(0, len(pieces), 12):
        yield re.sub(r"[{}]", "", "\n".join(pieces[start : start + 12])).strip()


def glosses(root: Path) -> Iterator[str]:
    """WordNet's synsets as sentences, forty to a document."""
    lines = []
    for part in ("noun", "verb", "adj"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                head, _, gloss = line.partition(" | ")
                lines.append(f"{head.split()[4].replace('_', ' ')}: {gloss.strip()}")
    for start in range(0, len(lines), 160):
        yield "\n".join(lines[start : start + 40])


def definitions(base: Path, sense_index: Path) -> dict[str, str]:
    """The first gloss of the nouns that WordNet's tagged texts use most."""
    counts: dict[str, tuple[int, str]] = {}
    for line in sense_index.read_text(encoding="utf-8").splitlines():
        key, offset, _, count = line.split()
        lemma, _, rest = key.partition("%")
        if rest[0] == "1" and lemma.isalpha() and lemma.islower() and len(lemma) > 2:
            counts[lemma] = max(counts.get(lemma, (0, "")), (int(count), offset))
    by_offset = {}
    for line in (base / "data.noun").read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        by_offset[head[:8]] = re.split(r";|--", gloss)[0].strip()
    common = sorted(counts, key=lambda lemma: (-counts[lemma][0], lemma))
    found = ((lemma, by_offset[counts[lemma][1]]) for lemma in common)
    return dict(
        islice(
            ((lemma, gloss) for lemma, gloss in found if 8 <= len(gloss) <= 90 and "(" not in gloss), NUM_DEFINITIONS
        )
    )


def documents(directory: Path) -> Iterator[str]:
    roots = {package: fetch(package, directory) for package in PACKAGES}
    yield from python_documentation(roots["python3.11-doc"])
    yield from austen_novels(roots["r-cran-janeaustenr"])
    yield from glosses(roots["wordnet-base"])
    for name in ("devil", "jargon"):
        yield from dictionary(roots[f"dict-{name}"] / f"usr/share/dictd/{name}.dict.dz")
    for name in ("us-constitution", "us-declaration"):
        yield gzip.decompress((roots["miscfiles"] / f"usr/share/state/{name}.gz").read_bytes()).decode(
            "utf-8", "replace"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        texts = [text for text in documents(Path(scratch)) if len(text) >= MIN_DOCUMENT]
        wordnet = Path(scratch) / "wordnet-base/usr/share/wordnet"
        common = definitions(wordnet, Path(scratch) / "wordnet-sense-index/usr/share/wordnet/index.sense")
    (output / "prose.txt").write_text(f"\n{DOCUMENT_BREAK}\n".join(texts), encoding="utf-8")
    (output / "definitions.json").write_text(json.dumps(common, indent=0), encoding="utf-8")
    print(f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(common)} definitions")


if __name__ == "__main__":
    main()
