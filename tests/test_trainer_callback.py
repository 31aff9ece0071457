"""The callbacks in a real Trainer, resumed from a checkpoint, and the two training scripts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_optim import batch, model, products, vector
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

from manifold_merge.trainer_callback import FrechetAverageCallback, FrechetPullCallback

# The Trainer asks for its data loader's pinned memory also where there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SCRIPTS = Path(__file__).resolve().parent.parent / "tutorials" / "training"


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.ids, self.targets = batch(0)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "target": self.targets[i].float()}


class Distillation(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        target = inputs.pop("target")
        output = model(**inputs)
        loss = (output.last_hidden_state.mean(1) - target).square().mean()
        return (loss, output) if return_outputs else loss


def trainer(folder, callback, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        save_strategy="steps",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=0,
        **options,
    )
    return Distillation(
        model=model(1, torch.float32), args=arguments, train_dataset=Data(), callbacks=[callback]
    )


def pull(lr=0.2, **options):
    return FrechetPullCallback([model(2, torch.float32)], lr=lr, **options)


def test_pull_brings_models_together(tmp_path):
    ends = {}
    for lr in (0.0, 0.2):
        run = trainer(tmp_path / str(lr), pull(lr))
        run.train()
        ends[lr] = products(run.model)
    target = products(model(2, torch.float32))
    assert float((ends[0.2] - target).norm()) < 0.5 * float((ends[0.0] - target).norm())


def test_pull_falls_with_the_schedule(tmp_path):
    callback = pull(decay=True)
    trainer(tmp_path, callback).train()
    assert callback.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["pull", "average"])
def test_training_resumes_with_the_same_result(tmp_path, kind):
    def callback():
        if kind == "pull":
            return pull()
        return FrechetAverageCallback(multi_avg_fn=get_ema_multi_avg_fn(0.7))

    whole_callback, resumed_callback = callback(), callback()
    whole = trainer(tmp_path, whole_callback)
    whole.train()
    resumed = trainer(tmp_path, resumed_callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(vector(resumed.model), vector(whole.model))
    if kind == "average":
        one, two = whole_callback.averaged, resumed_callback.averaged
        assert int(one.n_averaged) == int(two.n_averaged) == 6
        assert torch.equal(vector(one.module), vector(two.module))
        assert not torch.equal(vector(one.module), vector(whole.model))


def test_average_of_some_steps(tmp_path):
    callback = FrechetAverageCallback(every=2, start=1)
    trainer(tmp_path, callback).train()
    assert int(callback.averaged.n_averaged) == 3
    with pytest.raises(ValueError, match="every"):
        FrechetAverageCallback(every=0)


def test_a_checkpoint_without_average_is_told(tmp_path):
    trainer(tmp_path, pull()).train()
    resumed = trainer(tmp_path, FrechetAverageCallback())
    with pytest.raises(FileNotFoundError, match="no Fréchet average"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pull", "average"])
def test_scripts_resume_in_the_middle(tmp_path, script):
    """At most 40 lines, and the second half continues bit for bit."""
    file = SCRIPTS / f"{script}.py"
    assert len(file.read_text("utf-8").splitlines()) <= 40
    results = {}
    for name, stops in (("whole", ["4"]), ("parts", ["2", "4"])):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            command = [sys.executable, str(file), str(folder), stop]
            subprocess.run(command, check=True, capture_output=True)
        results[name] = torch.load(folder / "checkpoint.pt")
    for part in ("model", "average"):
        if part in results["whole"]:
            for key, value in results["whole"][part].items():
                assert torch.equal(results["parts"][part][key], value), key
