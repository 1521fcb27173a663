"""nnssl_cluster and the training on its clusters as a user runs them, from raw volumes."""

import numpy as np
import pytest
import torch

from nnssl_ext.cli import cluster, plan_and_preprocess, train
from nnssl_ext.preprocessing.clusters import FOLDER
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.checkpoint import load_checkpoint
from tests.make_nnunet import make_checkpoint
from tests.make_raw import nnunet_dataset

SHORT = ["-device", "cpu", "-o", "epochs=1", "iterations=2", "batch_size=1", "workers=0"]
RUN = "PixelClusterTrainer__nnsslPlans__3d_fullres__epochs=1_iterations=2_batch_size=1"


@pytest.fixture
def dataset(folders):
    """Folder of the preprocessed cases."""
    nnunet_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "801", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    return folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_3d_fullres"


def run(action, *arguments):
    return cluster.main([action, "801", "3d_fullres", "-device", "cpu", *map(str, arguments)])


def error_of(capsys):
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


def test_from_a_checkpoint_over_clusters_to_a_network_that_tells_them(dataset, folders, tmp_path, capsys):
    checkpoint, results = make_checkpoint(tmp_path / "c.pth", "resenc"), folders["nnssl_results"] / "Dataset801_Test" / RUN / "fold_all"
    assert train.main(["801", "3d_fullres", "-tr", "PixelClusterTrainer", *SHORT]) == 2
    assert "nnssl_cluster fit 801 3d_fullres -ckpt CHECKPOINT" in error_of(capsys)
    assert run("fit", "-ckpt", checkpoint, "-k", 4) == 0
    said = capsys.readouterr().out
    assert "4 clusters with " in said and "now: nnssl_cluster assign 801 3d_fullres" in said
    assert train.main(["801", "3d_fullres", "-tr", "PixelClusterTrainer", *SHORT]) == 2
    assert "cases have no labels of the present clusters" in error_of(capsys)
    assert run("assign") == 0
    store = CaseStore(dataset)
    labels, names = store.clusters(), store.identifiers
    assert labels.classes == 4 and sorted(file.stem for file in (dataset / FOLDER).glob("*.png")) == names
    found = [labels.read(case, tuple((0, n) for n in store.shape(case))) for case in range(len(names))]
    assert set(np.unique(np.concatenate([volume.ravel() for volume in found]))) <= {0, 1, 2, 3, 4}
    assert train.main(["801", "3d_fullres", "-tr", "PixelClusterTrainer", *SHORT]) == 0
    content = load_checkpoint(results / "checkpoint_final.pth")
    assert content["clusters"] == labels.model and content["transfer"] == "encoder+decoder"
    assert content["ssl_state"]["head.weight"].shape[0] == 4 and list((results / "pictures").glob("*.png"))
    capsys.readouterr()

    # labels are made once; a damaged case, other clusters
    assert run("assign") == 0
    assert f"{len(names)} cases were done before" in capsys.readouterr().out
    (dataset / FOLDER / f"{names[0]}.b2nd").write_bytes(b"")
    assert run("assign") == 0
    assert f"{len(names) - 1} cases were done before" in capsys.readouterr().out and np.array_equal(labels.read(0, ((0, 4),) * 3), found[0][:, :4, :4, :4])
    assert run("fit", "-ckpt", checkpoint, "-k", 4, "-upsampling", "bilateral") == 0
    assert train.main(["801", "3d_fullres", "-tr", "PixelClusterTrainer", *SHORT, "--c"]) == 2
    assert "no labels of the present clusters" in error_of(capsys)

    # the backbone must be the one of the clusters
    checkpoint.unlink()
    assert run("assign") == 2
    assert "checkpoint not found" in error_of(capsys)
    assert run("assign", "-ckpt", make_checkpoint(tmp_path / "other.pth", "primus")) == 2
    assert "fitted to the features of another backbone" in error_of(capsys)
    assert run("assign", "-ckpt", make_checkpoint(tmp_path / "again.pth", "resenc")) == 0


def test_mistakes_end_with_exit_code_2_and_say_how_to_mend_them(dataset, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "c.pth", "resenc")
    for arguments, message in (
        (["fit"], "whose features"),
        (["assign", "-k", 5], "-k belongs to the model that was fitted"),
        (["assign"], "no clusters have been fitted"),
        (["fit", "-ckpt", checkpoint, "-p", "otherPlans"], "nnssl_plan_and_preprocess -d 801"),
        (["fit", "-ckpt", make_checkpoint(tmp_path / "two.pth", "resenc", channels=2)], "the checkpoint's backbone takes 2"),
    ):
        assert run(*arguments) == 2
        assert message in error_of(capsys)
    assert cluster.main(["fit", "801", "3d_fulres", "-ckpt", str(checkpoint)]) == 2
    assert "did you mean '3d_fullres'" in error_of(capsys)
    if not torch.cuda.is_available():
        assert cluster.main(["fit", "801", "3d_fullres", "-ckpt", str(checkpoint), "-device", "cuda"]) == 2
        assert "no CUDA card" in error_of(capsys)
