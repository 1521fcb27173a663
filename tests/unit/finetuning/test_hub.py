"""Models to be shared: written, read back, refused where they are not what they say; the Hub itself is a fake."""

import json
import re
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from nnssl_ext.cli import export
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import sha256_file
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.finetuning.commands import hand_off
from nnssl_ext.finetuning.hub import share
from nnssl_ext.finetuning.plans import PlanOptions
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from nnssl_ext.trainers.model_folder import locate, repository
from tests.make_data import slice_plan
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, write_fingerprint


@pytest.fixture
def shared(tmp_path):
    """A checkpoint of a U-Net, whose tensors have several names, and the folder that shares it."""
    file = make_checkpoint(tmp_path / "run" / "checkpoint_final.pth", "resenc", transfer="encoder+decoder")
    share(file, str(tmp_path / "model"))
    return file, tmp_path / "model"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """The Hub as a folder, with a record of what was asked of it."""

    class FakeApi:
        folder, calls = tmp_path / "hub", []

        def create_repo(self, name, **options):
            self.calls.append(("create", name, options))
            return f"https://huggingface.co/{name}"

        def file_exists(self, name, file, revision=None):
            return (self.folder / file).is_file()

        def hf_hub_download(self, name, file, revision=None):
            return str(self.folder / file)

        def upload_folder(self, *, repo_id, folder_path, revision, **options):
            self.calls.append(("upload", repo_id, revision))
            shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)

    def download(name, revision=None, allow_patterns=None):
        FakeApi.calls.append(("download", name, revision, allow_patterns))
        if not FakeApi.folder.is_dir():
            raise LocalEntryNotFoundError("no connection")
        return str(FakeApi.folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return FakeApi


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_a_shared_model_says_what_its_checkpoint_says_with_the_same_tensors_and_aliases(shared):
    file, folder = shared
    old, new = load_checkpoint(file), load_checkpoint(folder)
    tensors = old.pop("network_weights"), new.pop("network_weights")
    assert old == new
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) and value.dtype == tensors[1][name].dtype for name, value in tensors[0].items())
    assert len({value.data_ptr() for value in tensors[0].values()}) == len({value.data_ptr() for value in tensors[1].values()}) < len(tensors[0])
    assert Pretrained.load(file).identity == Pretrained.load(folder).identity
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_nnunet_gets_the_same_plan_and_the_same_tensors_from_both(shared, tmp_path, monkeypatch):
    roots = make_roots(tmp_path, monkeypatch)
    dataset = make_dataset(roots, 901, ["CT"], cases=1)
    write_fingerprint(roots, dataset, 1)
    written = []
    for number, given in enumerate(shared):
        handoff = hand_off(Pretrained.load(given), dataset, PlanOptions(), "nnUNetTrainer", tmp_path / f"out{number}")
        written.append((handoff.plans.read_bytes(), torch.load(handoff.weights, weights_only=True)))
    (plan, content), (other_plan, other) = written
    old, new = content.pop("network_weights"), other.pop("network_weights")
    assert plan == other_plan and content == other
    assert old.keys() == new.keys() and all(torch.equal(value, new[name]) for name, value in old.items())


@pytest.mark.parametrize("family", ["resenc", "primus", "primus_v2", "segformer3d", "slices"])
def test_the_examples_of_the_card_run_as_they_stand_and_load_the_weights(tmp_path, monkeypatch, family):
    options = {"plan": slice_plan(), "configuration": "2d"} if family == "slices" else {}
    file = make_checkpoint(tmp_path / "c.pth", "resenc" if options else family, **options)
    share(file, str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    monkeypatch.chdir(tmp_path / "model")
    exec(first, names)
    exec(second, names)
    state, expected = names["net"].state_dict(), load_checkpoint(file)["network_weights"]
    assert state.keys() == expected.keys() and all(torch.equal(state[name], value) for name, value in expected.items())
    assert isinstance(names["extractor"], Extractor)


def test_the_card_has_yaml_for_the_hub_and_no_path_of_this_machine(shared, tmp_path):
    _, folder = shared
    fields = front_matter(folder)
    assert fields["library_name"] == "nnssl_ext" and fields["license"] == "unknown" and {"ct", "resenc", "MAE"} <= set(fields["tags"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"\n## {section}\n" in card for section in ("Data", "Plan", "Method", "Health", "Licence", "Loading", "Fine-tuning", "Citation"))
    assert "**UNKNOWN.**" in card and "He et al. 2022" in card and "3 x 3 x 3 mm" in card
    assert str(tmp_path) not in card + (folder / "config.json").read_text(encoding="utf-8")


def test_alarms_figures_and_curves_come_from_the_run_folder_and_training_images_only_on_request(tmp_path):
    file = make_checkpoint(tmp_path / "run" / "checkpoint_final.pth", "resenc")
    run = {"trainer": "MAETrainer", "cases": {"train": 18, "validation": 6}, "config": {"epochs": 9}, "overrides": {}}
    records = [{"epoch": 0, "step": 1, "alarms": ["the loss rose"]}, {"epoch": 1, "step": 2, "train/total": 0.25, "health/rank": 7.0}]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (tmp_path / "run" / "pictures").mkdir()
    for name in ("progress.png", "pictures/epoch_0002.png"):
        (tmp_path / "run" / name).write_bytes(name.encode())
    share(file, str(tmp_path / "model"), licence="cc-by-4.0", pictures=True)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "alarm in epoch 1: the loss rose" in card and "| train/total | 0.25 |" in card and "| health/rank | 7 |" in card
    assert "24 (18 for train, 6 for validation)" in card and "those after step 2, the weights those after step 3" in card
    assert front_matter(tmp_path / "model")["license"] == "cc-by-4.0" and "UNKNOWN" not in card
    assert (tmp_path / "model" / "views.png").read_bytes() == b"pictures/epoch_0002.png"
    share(file, str(tmp_path / "model"))
    assert (tmp_path / "model" / "progress.png").is_file() and not (tmp_path / "model" / "views.png").exists()


def test_damaged_or_foreign_content_is_refused(shared):
    _, folder = shared
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def told(content) -> str:
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_checkpoint(folder)
        return str(caught.value)

    weights = config["weights"]["model.safetensors"]
    assert "not a shared model" in told({**config, "weights": {**config["weights"], "../../secret": weights}})
    assert "not a shared model" in told({**config, "format": "another"}) and "not a shared model" in told([])
    assert "can't be read" in told({**config, "weights": {"model.safetensors": {**weights, "aliases": {"a": "nowhere"}}}})
    assert "checkpoint format version 7" in told({**config, "checkpoint": {**config["checkpoint"], "format_version": 7}})
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "SHA-256 differs" in told(config)
    shutil.copyfile(folder / "config.json", folder / "model.safetensors")
    weights["sha256"] = sha256_file(folder / "model.safetensors")
    assert "can't be read" in told(config)
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors" in told(config)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no shared model"):
        load_checkpoint(folder)


def test_only_an_earlier_model_is_replaced_and_other_files_in_it_stay(shared, tmp_path):
    file, folder = shared
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    content = load_checkpoint(file)
    save_checkpoint(tmp_path / "other.pth", {**content, "step": 8})
    share(tmp_path / "other.pth", str(folder))
    assert load_checkpoint(folder)["step"] == 8 and (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("mine", encoding="utf-8")
    for target in (tmp_path / "thesis", file):
        before = sha256_file(file)
        with pytest.raises(UserError, match="something else"):
            share(file, str(target))
        assert sha256_file(file) == before
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["README.md"] and not list(tmp_path.glob(".*.tmp"))


def test_a_failed_export_leaves_no_folder(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_ext.trainers.model_folder.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        share(shared[0], str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_a_model_is_uploaded_as_private_and_loaded_by_its_name(shared, fake_hub, capsys):
    file, _ = shared
    assert export.main(["-ckpt", str(file), "--hub", "hf://lab/mae", "--license", "cc-by-4.0"]) == 0
    assert capsys.readouterr().out == "shared:  https://huggingface.co/lab/mae\n"
    assert [call[:2] for call in fake_hub.calls] == [("create", "lab/mae"), ("upload", "lab/mae")] and fake_hub.calls[0][2]["private"]
    card = (fake_hub.folder / "README.md").read_text(encoding="utf-8")
    assert 'snapshot_download("lab/mae")' in card and "nnssl_finetune -ckpt hf://lab/mae -d 901" in card
    assert Pretrained.load(Path("hf://lab/mae@v1.0")).identity == Pretrained.load(file).identity
    assert fake_hub.calls[-1] == ("download", "lab/mae", "v1.0", ["config.json", "model.safetensors", "pretraining.safetensors"])


def test_another_ones_model_on_the_hub_is_not_replaced(shared, fake_hub):
    fake_hub.folder.mkdir()
    (fake_hub.folder / "config.json").write_text('{"architectures": ["Bert"]}', encoding="utf-8")
    with pytest.raises(UserError, match="not one of nnssl_ext"):
        share(shared[0], "hf://lab/bert")
    assert not any(call[0] == "upload" for call in fake_hub.calls)


def test_an_upload_without_a_connection_is_one_sentence(shared, fake_hub, monkeypatch, capsys):
    def offline(self, name, **options):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(fake_hub, "create_repo", offline)
    assert export.main(["-ckpt", str(shared[0]), "--hub", "hf://lab/mae"]) == 2
    assert "could not upload the model: no route to host" in capsys.readouterr().err


def test_what_cannot_be_downloaded_is_said_in_one_sentence(fake_hub):
    with pytest.raises(UserError, match="the Hub can't be reached, and the model is not in the cache"):
        locate("hf://lab/mae")


@pytest.mark.parametrize("text", ["hf://mae", "hf://../mae", "hf://a/b/c", "hf://a/b@", "hf://a/..", "hf:///etc/passwd"])
def test_a_wrong_name_is_refused_before_anything_is_asked(text):
    with pytest.raises(UserError, match="not the name of a model"):
        locate(text)


def test_a_name_survives_being_a_path_and_other_paths_are_none():
    assert repository(Path("hf://lab/mae@refs/pr/1")) == ("lab/mae", "refs/pr/1") and repository("hf://lab/mae") == ("lab/mae", None)
    assert repository("lab/mae") is None and locate("lab/mae") == Path("lab/mae")


def test_something_has_to_be_asked_for(shared, capsys):
    assert export.main(["-ckpt", str(shared[0])]) == 2
    assert "--hub FOLDER" in capsys.readouterr().err
