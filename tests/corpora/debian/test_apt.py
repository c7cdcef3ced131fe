"""Packages and indices from the machine's own apt, here a false one."""

import gzip
import json

import pytest
from support.debian import VOCAB_SIZE, index_texts, sha256, write_program

from fairseq_sparsemixer.corpora.debian import apt, extraction, preparation
from fairseq_sparsemixer.errors import UserError


def obtain(folder):
    return apt.obtain(folder, extraction.REQUIRED, extraction.OPTIONAL)


def test_complete_downloads_need_no_apt(shelf, programs):
    found = obtain(shelf)
    assert found == apt.read_record(shelf)
    assert [package.name for package in found.packages][:2] == list(extraction.REQUIRED[:2])
    assert list(apt.index_lines(shelf, found.indices[1]))[1] == f"Description-md5: {0:032}"


def damaged(path, data):
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "manpages_1.0_all.deb").unlink(),
        lambda f: damaged(f / "manpages_1.0_all.deb", b"!<arch>\n"),
        lambda f: damaged(f / "stable_main_Translation-de.gz", b"no gzip"),
        lambda f: damaged(f / "stable_main_Translation-de.gz", gzip.compress(b"other text")),
        lambda f: (f / "downloads.json").unlink(),
        lambda f: f.rename(f.with_name("elsewhere")),
        lambda f: damaged(
            f / "downloads.json", (f / "downloads.json").read_bytes().replace(b'"acct",', b"")
        ),
    ],
)
def test_without_apt_one_sentence_says_what_to_do(downloads, programs, damage):
    damage(downloads)
    with pytest.raises(UserError) as caught:
        obtain(downloads)
    message = str(caught.value)
    assert message.startswith("this machine has no apt")
    assert "--downloads DIR" in message and "--raw-dir DIR" in message
    assert "\n" not in message and ". " not in message


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "{}",
        '{"indices": [{}], "packages": [], "not_found": []}',
        '{"indices": [], "not_found": [], "packages": [{"file": "../x", "name": "x", '
        '"version": "1", "architecture": "all", "bytes": 1, "sha256": ""}]}',
    ],
)
def test_damaged_record_of_downloads(downloads, content):
    (downloads / "downloads.json").write_text(content)
    with pytest.raises(UserError, match=r"downloads.json .* a record .* --downloads"):
        obtain(downloads)


# apt-get and apt-cache of an archive in the folder ARCHIVE: lists.json (what indextargets says),
# packages.txt (what `show` says), and the packages. Every call is noted in `calls`.
FAKE_APT = """
import json, os, shutil, sys
archive = ARCHIVE
arguments = sys.argv[1:]
options, words = {}, []
while arguments:
    word = arguments.pop(0)
    if word == "-o":
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value
    elif word == "-c":
        options["settings"] = open(arguments.pop(0)).read()
    else:
        words.append(word)
words = [word for word in words if word != "-qq"]
with open(archive + "/calls", "a") as calls:
    calls.write(json.dumps([words, options, os.getcwd()]) + "\\n")
lists = options["Dir::State::lists"]
if words[0] == "update":
    if os.path.exists(archive + "/full"):
        print("E: Write error - write (28: No space left on device)", file=sys.stderr)
        sys.exit(100)
    if os.path.exists(archive + "/offline"):
        print("W: Failed to fetch the lists", file=sys.stderr)
        sys.exit(0)
    for name in os.listdir(archive + "/lists"):
        shutil.copy(archive + "/lists/" + name, lists)
elif words[0] == "indextargets":
    for entry in json.load(open(archive + "/targets.json")):
        entry["FILENAME"] = lists + "/" + entry["FILENAME"]
        form = words[2]
        for name, value in entry.items():
            form = form.replace("$(" + name + ")", value)
        print(form)
elif words[0] == "show":
    stanzas = open(archive + "/packages.txt").read().split("\\n\\n")
    print("\\n\\n".join(s for s in stanzas if s.split("\\n")[0].split(": ")[1] in words))
elif words[0] == "download":
    name, version = words[1].split("=")
    source = archive + "/" + name + ".deb"
    if not os.path.exists(source):
        sys.exit("E: Failed to fetch " + name)
    shutil.copy(source, name + "_" + version.replace(":", "%3a") + "_any.deb")
"""


@pytest.fixture
def archive(tmp_path, shelf, programs):
    """A machine with apt, and an archive that has what the downloads hold."""
    folder = tmp_path / "archive"
    (folder / "lists").mkdir(parents=True)
    targets = []
    for language in ("de", "en", "fr"):
        name = f"mirror.example_dists_stable_main_i18n_Translation-{language}"
        if language != "fr":
            text = gzip.decompress((shelf / f"stable_main_Translation-{language}.gz").read_bytes())
            (folder / "lists" / name).write_bytes(text)
        targets.append(target("stable", language, name))
    # A part of the archive that has no German.
    name = "mirror.example_dists_updates_main_i18n_Translation-en"
    (folder / "lists" / name).write_text("Package: x\n")
    targets.append(target("updates", "en", name))
    release = "Origin: Somebody\nDate: Sat, 11 Jul 2026 10:16:37 UTC\nDate: no\n"
    (folder / "lists" / "mirror.example_dists_stable_InRelease").write_text(release)
    (folder / "targets.json").write_text(json.dumps(targets))
    stanzas = []
    for path in sorted(shelf.glob("*.deb")):
        name = path.name.split("_")[0]
        data = path.read_bytes()
        (folder / f"{name}.deb").write_bytes(data)
        stanzas.append(
            f"Package: {name}\nVersion: 4:1.0\nArchitecture: all\nSize: {len(data)}\n"
            f"SHA256: {sha256(data)}\nDescription: d\n more\n"
        )
    # What the machine has, but no source.
    stanzas.append("Package: sed\nVersion: 9\nArchitecture: all\nStatus: install ok installed\n")
    (folder / "packages.txt").write_text("\n".join(stanzas))
    for program in ("apt-get", "apt-cache"):
        write_program(programs / program, FAKE_APT.replace("ARCHIVE", repr(str(folder))))
    return folder


def target(release, language, file):
    return {
        "RELEASE": release,
        "COMPONENT": "main",
        "LANGUAGE": language,
        "SUITE": f"old{release}",
        "CODENAME": "woody",
        "METAKEY": f"main/i18n/Translation-{language}",
        "FILENAME": file,
    }


def calls_of(archive):
    return [json.loads(line) for line in (archive / "calls").read_text().split("\n") if line]


def downloaded(archive):
    return [words[1].split("=")[0] for words, _, _ in calls_of(archive) if words[0] == "download"]


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_apt_fetches_what_is_missing_and_says_what_it_is(archive, shelf, tmp_path):
    folder = tmp_path / "a folder" / "download"
    found = obtain(folder)
    names = ["trans-de-en", "libreoffice-help-en-us", "libreoffice-help-de", "manpages-de",
             "manpages", "coreutils"]  # fmt: skip
    assert [package.name for package in found.packages] == downloaded(archive) == names
    index = "stable_main_Translation-{}.gz"
    debs = [f"{name}_4%3a1.0_all.deb" for name in names]
    assert listing(folder) == sorted(
        ["downloads.json", index.format("de"), index.format("en")] + debs
    )
    for name, file in zip(names, debs):
        assert (folder / file).read_bytes() == (archive / f"{name}.deb").read_bytes()
    assert [entry.language for entry in found.indices] == ["en", "de"]
    for entry in found.indices:
        text = gzip.decompress((folder / entry.file).read_bytes())
        assert text.decode() == index_texts()[entry.language]
        assert (entry.bytes, entry.sha256) == (len(text), sha256(text))
        assert (entry.suite, entry.codename) == ("oldstable", "woody")
        assert entry.date == "Sat, 11 Jul 2026 10:16:37 UTC"
    assert "sed" in found.not_found and "coreutils" not in found.not_found
    # No archive's address anywhere.
    assert "mirror.example" not in (folder / "downloads.json").read_text()
    assert obtain(folder) == found == apt.read_record(folder)
    assert downloaded(archive) == names


def test_one_folder_may_serve_several_corpora(archive, tmp_path, programs):
    folder = tmp_path / "download"
    first = obtain(folder)
    name = "mirror.example_dists_stable_main_i18n_Translation-fr"
    (archive / "lists" / name).write_text("Package: x\n")
    second = apt.obtain(folder, (), (), ["fr"])
    assert ([each.language for each in second.indices], second.packages) == (["en", "fr"], [])
    for program in ("apt-get", "apt-cache"):
        (programs / program).unlink()
    assert obtain(folder) == first and apt.obtain(folder, (), (), ["fr"]) == second


def test_apt_works_in_folders_of_its_own_with_the_machines_sources(archive, tmp_path):
    folder = tmp_path / "download"
    obtain(folder)
    for words, options, place in calls_of(archive):
        settings = options.pop("settings")
        assert options.pop("APT::Sandbox::User") == "root"
        assert {"Dir::State::lists", "Dir::State::status", "Dir::Cache::archives"} <= set(options)
        assert all(name.startswith(("Dir::State", "Dir::Cache")) for name in options)
        assert all(value.startswith(f"{folder}/.apt.partial") for value in options.values())
        assert 'Acquire::Languages { "en"; "de"; };' in settings
        for name in ("Acquire::Languages", "APT::Update::Post-Invoke-Success"):
            assert f"#clear {name};" in settings
        assert words[0] != "download" or place.startswith(f"{folder}/.apt.partial/")


def test_apt_goes_on_where_it_was_stopped(archive, tmp_path):
    folder = tmp_path / "download"
    (archive / "libreoffice-help-de.deb").rename(archive / "away")
    with pytest.raises(UserError) as caught:
        obtain(folder)
    message = str(caught.value)
    assert message.startswith("apt could not download libreoffice-help-de 4:1.0 (E: Failed to")
    assert "--downloads DIR" in message and "\n" not in message
    first = ["trans-de-en", "libreoffice-help-en-us"]
    kept = listing(folder)
    assert [name for name in kept if name.endswith(".deb")] == sorted(
        f"{name}_4%3a1.0_all.deb" for name in first
    )
    assert not any("partial" in name or name == "downloads.json" for name in kept)
    (archive / "away").rename(archive / "libreoffice-help-de.deb")
    # What a kill without a chance to tidy up leaves behind.
    (folder / ".apt.partial" / "lists").mkdir(parents=True)
    (folder / f"{first[0]}_4%3a1.0_all.deb").write_bytes(b"cut off")
    found = obtain(folder)
    again = ["trans-de-en", "libreoffice-help-de", "manpages-de", "manpages", "coreutils"]
    assert downloaded(archive) == [*first, "libreoffice-help-de", *again]
    assert apt.read_record(folder) == found
    assert not (folder / ".apt.partial").exists()


def test_a_package_that_comes_damaged_is_not_kept(archive, tmp_path):
    (archive / "trans-de-en.deb").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"trans-de-en 4:1\.0 came damaged"):
        obtain(tmp_path / "download")
    assert not any(name.endswith(".deb") for name in listing(tmp_path / "download"))


def test_languages_that_the_archive_lacks(archive, tmp_path):
    folder = tmp_path / "download"
    with pytest.raises(UserError) as caught:
        apt.obtain(folder, (), (), ["de", "fr"])
    message = str(caught.value)
    assert "no package descriptions in English and fr: check the network and the names" in message
    assert 'Acquire::Languages { "en"; "de"; "fr"; };' in calls_of(archive)[0][1]["settings"]
    assert [each.language for each in apt.obtain(folder, (), ()).indices] == ["en", "de"]
    assert not downloaded(archive)


def test_required_packages_and_indices(archive, tmp_path):
    stanzas = (archive / "packages.txt").read_text()
    (archive / "packages.txt").write_text(stanzas.replace("Package: manpages-de", "Package: other"))
    with pytest.raises(UserError, match="have no package manpages-de: run the command on"):
        obtain(tmp_path / "download")
    (archive / "offline").touch()
    with pytest.raises(UserError, match=r"no package descriptions .*\(W: Failed to fetch the list"):
        obtain(tmp_path / "download")
    assert "downloads.json" not in listing(tmp_path / "download")


def test_a_full_disk_is_not_taken_for_a_missing_network(archive, tmp_path):
    (archive / "full").touch()
    with pytest.raises(UserError, match=r"no space left on the disk of .*, or .* --downloads"):
        preparation.prepare_debian(tmp_path / "out", vocab_size=VOCAB_SIZE)


def test_folders_below_a_file(archive, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--downloads .*Not a directory"):
        preparation.prepare_debian(tmp_path / "out", downloads=tmp_path / "file" / "x")
    with pytest.raises(UserError, match=r"--output .* is not a folder"):
        preparation.prepare_debian(tmp_path / "file" / "x", downloads=tmp_path)
