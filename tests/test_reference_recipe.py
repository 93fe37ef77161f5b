"""The recipe of the reference models: texts out of packages, packed tokens, the bundled part. Nothing here needs torch."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
from builders import make_trace

from traces import InputError, bundled, load_trace, save_trace
from traces.reference.__main__ import main
from traces.reference.bundle import bundle, read_run
from traces.reference.models import MODELS, reference_model, tiny
from traces.reference.parts import load_parts
from traces.reference.text import (
    DEBIAN_PACKAGES,
    DOMAINS,
    PYTHON_PACKAGES,
    Source,
    find_package,
    read_documents,
    write_texts,
)
from traces.reference.tokenizer import PIECE, sample, train_tokenizer
from traces.reference.tokens import open_tokens, pack_domain, write_domain, write_manifest

# --- models ---------------------------------------------------------------------------------------------


def test_the_models_differ_in_everything_that_a_policy_could_rely_on():
    first, second = MODELS.values()
    for size in ("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "norm_topk_prob"):
        assert first.shape[size] != second.shape[size], size
    assert first.architecture != second.architecture
    assert first.seed != second.seed


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_called_by_its_shape(name):
    shape = MODELS[name].shape
    assert name == f"reference_{shape['num_hidden_layers']}x{shape['num_experts']}_top{shape['num_experts_per_tok']}"


@pytest.mark.parametrize("name", MODELS)
def test_lookahead_ranks_twice_top_k(name):
    assert MODELS[name].recording.predictions == 2 * MODELS[name].shape["num_experts_per_tok"]


def test_an_unknown_model_is_refused():
    with pytest.raises(InputError, match="no reference model 'reference_24x32'; did you mean 'reference_24x32_top4'"):
        reference_model("reference_24x32")


# --- text -----------------------------------------------------------------------------------------------


def wheel(folder, name, files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def debian_package(folder, name, files):
    """Build a package as Debian's own tool does."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    tree = folder / f"tree of {name}"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {"Package": name, "Version": "1", "Architecture": "all", "Maintainer": "nobody", "Description": "test"}
    (tree / "DEBIAN" / "control").write_text("".join(f"{field}: {value}\n" for field, value in fields.items()))
    for file, content in files.items():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text(content)
    path = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "-Zxz", tree, path], check=True, capture_output=True)
    return path


def test_a_wheels_files_are_read_in_the_order_of_their_paths(tmp_path):
    path = wheel(tmp_path, "some", {"b.py": "second", "a.py": "first", "c.txt": "no text of this source"})
    assert read_documents(path, Source("some", (".py",))) == ["first", "second"]


def test_files_are_chosen_by_folder_and_size(tmp_path):
    path = wheel(tmp_path, "some", {"in/a.py": "kept", "out/b.py": "elsewhere", "in/long.py": "x" * 99})
    assert read_documents(path, Source("some", (".py",), ("in/",), largest=50)) == ["kept"]


def test_markup_is_left_out(tmp_path):
    page = "<head><title>no</title></head><p>one &amp; two</p><script>no</script><p>three <b>four</b></p>"
    path = wheel(tmp_path, "some", {"a.html": page})
    assert read_documents(path, Source("some", (".html",)))[0].split() == ["one", "&", "two", "three", "four"]


def test_a_debian_packages_files_are_read(tmp_path):
    path = debian_package(tmp_path, "some", {"usr/share/a.txt": "text\n", "usr/share/b.bin": "none"})
    assert read_documents(path, Source("some", (".txt",))) == ["text\n"]


def test_a_damaged_package_is_refused(tmp_path):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    (tmp_path / "some_1_all.deb").write_text("no archive")
    with pytest.raises(InputError, match=r"some_1_all\.deb: dpkg-deb cannot read it .* download it again"):
        read_documents(tmp_path / "some_1_all.deb", Source("some", (".txt",)))


def test_a_damaged_wheel_is_refused(tmp_path):
    (tmp_path / "some-1.0-py3-none-any.whl").write_text("no archive")
    with pytest.raises(InputError, match=r"some-1\.0-py3-none-any\.whl: this is no whole wheel .* download it again"):
        read_documents(tmp_path / "some-1.0-py3-none-any.whl", Source("some", (".py",)))


def test_a_package_without_its_inner_archive_is_refused(tmp_path):
    path = debian_package(tmp_path, "some", {"usr/share/a.txt": "text\n"})
    with pytest.raises(InputError, match=r"it holds no file 'usr/src/some\.tar\.xz'; take another version"):
        read_documents(path, Source("some", (".c",), archive="usr/src/some.tar.xz"))


def test_a_missing_and_a_doubled_package_are_refused(tmp_path):
    with pytest.raises(InputError, match="the package 'some' is not there; download one version"):
        find_package(tmp_path, Source("some", (".py",)))
    for version in ("1.0", "2.0"):
        (tmp_path / f"some-{version}-py3-none-any.whl").touch()
    with pytest.raises(InputError, match="the package 'some' is there 2 times"):
        find_package(tmp_path, Source("some", (".py",)))


def test_long_lines_are_kept_where_they_come_first(tmp_path, monkeypatch):
    line = "a line of more than sixty characters, such as every licence has at its beginning"
    wheel(tmp_path, "one", {"a.py": f"{line}\nshort\n"})
    wheel(tmp_path, "two", {"a.py": f"short\n{line}\nown\n"})
    domains = {name: (Source(name, (".py",)),) for name in ("one", "two")}
    monkeypatch.setattr("traces.reference.text.DOMAINS", domains)
    assert write_texts(tmp_path, tmp_path / "texts") == {"one": len(line) + 6, "two": 9}
    assert (tmp_path / "texts" / "two.txt").read_text() == "short\nown"


def test_seven_domains_name_the_packages_to_download():
    assert len(DOMAINS) == 7
    assert len({*DEBIAN_PACKAGES, *PYTHON_PACKAGES}) == sum(map(len, DOMAINS.values()))


# --- tokenizer and tokens -------------------------------------------------------------------------------


def test_a_sample_is_spread_evenly_over_each_text():
    text = "".join(chr(65 + piece) * PIECE for piece in range(6))
    assert [piece[0] for piece in sample([text, "z"], characters=3 * PIECE)] == ["A", "C", "E", "z"]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_text("".join(f"line {number} of a text\n" for number in range(2000)))
    return folder


def trained_tokenizer(texts):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    train_tokenizer(texts, ["one"], texts.parent / "tokenizer.json", 300)
    return texts.parent / "tokenizer.json"


def test_training_and_packing_twice_gives_the_same_bytes(texts, tmp_path):
    tokenizer = trained_tokenizer(texts)
    first = tokenizer.read_bytes()
    assert trained_tokenizer(texts).read_bytes() == first
    assert pack_domain(texts, "one", tokenizer, tmp_path) == pack_domain(texts, "one", tokenizer, tmp_path)


def test_every_line_is_trained_on_or_held_out(texts, tmp_path):
    from tokenizers import Tokenizer  # fixture `texts` alone does not need it

    tokenizer = trained_tokenizer(texts)
    domain = pack_domain(texts, "one", tokenizer, tmp_path)
    write_manifest(tmp_path, {"one": domain}, 300, {})
    tokens, decoder = open_tokens(tmp_path), Tokenizer.from_file(str(tokenizer))
    trained = decoder.decode(tokens.read("one", "train").tolist())
    held_out = [decoder.decode(segment.tolist()) for segment in tokens.held_out_segments("one")]
    assert len(held_out) == 8
    assert len(trained) + sum(map(len, held_out)) == domain.characters
    assert not {*trained.split("\n")} & {line for segment in held_out for line in segment.split("\n")[:-2] if line}


def packed(folder, domains=("one", "two"), train=400, segment=80):
    """Write random tokens, a few of them frequent, of a vocabulary of 64; every step after packing can use the folder."""
    rng = np.random.default_rng(0)

    def text(count):
        return np.minimum(rng.zipf(1.5, count), 63).astype(np.uint16)

    written = {domain: write_domain(folder, domain, text(train), [text(segment) for _ in range(8)]) for domain in domains}
    write_manifest(folder, written, 64, {})
    return open_tokens(folder)


def test_tokens_are_read_as_they_were_written(tmp_path):
    tokens = packed(tmp_path)
    assert (tokens.vocabulary, list(tokens.domains)) == (64, ["one", "two"])
    assert [len(segment) for segment in tokens.held_out_segments("two")] == [80] * 8
    np.testing.assert_array_equal(np.concatenate(tokens.held_out_segments("two")), tokens.read("two", "held_out"))


def test_other_bytes_than_the_manifests_are_refused(tmp_path):
    tokens = packed(tmp_path)
    shutil.copy(tmp_path / "one.train.xz", tmp_path / "two.train.xz")
    with pytest.raises(InputError, match=r"two\.train\.xz: it is not the file that manifest\.json describes"):
        tokens.read("two", "train")


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"vocabulary": 1, "domains": {"one": {"tokens": 3}}}'])
def test_a_folder_without_a_manifest_of_tokens_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"manifest\.json: there is no such file"):
        open_tokens(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: this is no manifest of packed tokens"):
        open_tokens(tmp_path)


# --- bundle ---------------------------------------------------------------------------------------------


@pytest.fixture
def ran(tmp_path):
    """A model and the folder that its run wrote: two rounds of two requests of five tokens, made up."""
    reference = tiny(MODELS["reference_16x64_top8"])
    reference = replace(reference, bundled=replace(reference.bundled, tokens=3))
    recordings = []
    for number in (1, 2):
        requests = [0] * 5 + [1] * 5
        part = make_trace([[[number, 0]]] * 10, requests=requests, prompts=[2, 2], expert_count=8)
        path = tmp_path / f"{reference.name}-{number}.safetensors"
        part = replace(part, domains=("one", "two"))
        recordings.append({"hash": save_trace(part, path), "recorded": "0" * 64})
    about = {
        "reference": reference.as_json(),
        "recordings": recordings,
        "training": {"tokens": 1000, "steps": 4, "log": [[1, 2]]},
        "parameters": 10,
        "active_parameters": 5,
        "held_out_loss": {"one": 3.0, "two": 2.5},
        "tokens_manifest_sha256": "1" * 64,
        "recorder": {"version": "0.1.0"},
        "versions": {"torch": "2"},
        "device": "none",
    }
    (tmp_path / f"{reference.name}.run.json").write_text(json.dumps(about))
    return reference, tmp_path


def test_the_bundled_part_is_the_first_tokens_of_the_first_rounds(ran, tmp_path):
    reference, folder = ran
    part = bundle(reference, folder, tmp_path / "part.safetensors")
    assert load_trace(tmp_path / "part.safetensors", verify=True).tokens == part.tokens == 6
    assert (part.domains, part.model.name) == (("one", "two"), reference.title)
    assert (part.experts[..., 0] == 1).all(), "round 2 is not among them"


def test_the_bundled_part_says_where_it_comes_from(ran, tmp_path):
    reference, folder = ran
    details = bundle(reference, folder, tmp_path / "part.safetensors").provenance.details
    assert details["seed"] == reference.seed
    assert details["shape"] == reference.shape
    assert details["training"]["tokens"] == 1000
    assert "log" not in details["training"]
    assert details["held_out_loss_nats_per_token"] == {"one": 3.0, "two": 2.5}
    assert details["recording_hashes"] == ["0" * 64]
    assert details["recorder"]["version"] == "0.1.0"
    assert details["part"]["requests"] == "the first 1 of 2 in each domain"


def test_parts_of_another_run_are_refused(ran, tmp_path):
    reference, folder = ran
    (folder / f"{reference.name}-2.safetensors").unlink()
    with pytest.raises(InputError, match="the parts are not those that"):
        bundle(reference, folder, tmp_path / "part.safetensors")
    (folder / f"{reference.name}-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no tiny_reference_16x64_top8-1\.safetensors"):
        load_parts(folder, reference.name)


def test_a_run_of_other_settings_is_refused(ran):
    reference, folder = ran
    with pytest.raises(InputError, match=r"run\.json: reference\.seed is 1; the settings of .* differ now"):
        read_run(folder, replace(reference, seed=7))
    read_run(folder, replace(reference, bundled=replace(reference.bundled, tokens=2)))


@pytest.mark.parametrize(("content", "words"), [("{", "this is no JSON"), ("{}", "the run has no 'recordings'")])
def test_a_run_that_says_nothing_is_refused(ran, content, words):
    reference, folder = ran
    (folder / f"{reference.name}.run.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_run(folder, reference)


def test_a_part_that_is_too_large_leaves_the_old_one(ran, tmp_path):
    reference, folder = ran
    target = tmp_path / "part.safetensors"
    target.write_text("old")
    with pytest.raises(InputError, match=r"part\.safetensors: it would have [\d,]+ bytes and may have 10"):
        bundle(replace(reference, bundled=replace(reference.bundled, most_bytes=10)), folder, target)
    assert target.read_text() == "old"


@pytest.mark.parametrize("name", sorted(bundled()))
def test_a_bundled_recording_is_what_the_recipe_says(name):
    reference, trace = reference_model(name), load_trace(bundled()[name])
    assert bundled()[name].stat().st_size <= reference.bundled.most_bytes
    assert (trace.model.name, trace.model.layers) == (reference.title, reference.layers)
    assert trace.tokens == 7 * reference.bundled.rounds * reference.bundled.tokens
    assert set(trace.domains) == set(DOMAINS) == set(trace.provenance.details["held_out_loss_nats_per_token"])
    assert trace.lookahead_experts.shape[2:] == (reference.recording.depth, reference.recording.predictions)


# --- the command ----------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert main(["bundle", "reference_16x64", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("traces.reference: there is no reference model 'reference_16x64'; did you")


def test_steps_in_the_wrong_order_are_one_sentence(tmp_path, capsys):
    assert main(["tokens", "--corpus", str(tmp_path)]) == 2
    assert (
        "tokenizer.json: there is no such file; `python -m traces.reference tokenizer` writes it" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_training_says_which_package_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    assert main(["train", "reference_16x64_top8"]) == 2
    assert "needs the package torch, which is not installed: pip install 'foregate[real]'" in capsys.readouterr().err


def test_settings_are_json():
    for model in MODELS.values():
        assert json.loads(json.dumps(model.as_json())) == json.loads(json.dumps(asdict(model)))
