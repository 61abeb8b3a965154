"""The loss without the adapter, before training or on examples that no step read; and the log."""

import pytest

from modulora_core.errors import AdapterError
from modulora_core.tests.stopped_runs import stop_finetune
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.finetune import finetune
from modulora_core.training.run_log import RunLog
from modulora_core.training.trainer import AdapterTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("packing", [False, True])
def test_the_held_out_loss_is_on_examples_that_no_step_read(
    configure, tmp_path, monkeypatch, packing
):
    rows = [{"prompt": f"say {i}", "completion": f" {i * i}"} for i in range(400)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", *rows))
    config = configure(data=data, steps=10, baseline=True, packing=packing, save_every=5)
    read = []
    forward = AdapterTrainer.compute_loss, AdapterTrainer.prediction_step

    def noted(number):
        def step(self, model, inputs, *more, **options):
            read.extend((number == 0, str(row.tolist())) for row in inputs["input_ids"])
            return forward[number](self, model, inputs, *more, **options)

        return step

    monkeypatch.setattr(AdapterTrainer, "compute_loss", noted(0))
    monkeypatch.setattr(AdapterTrainer, "prediction_step", noted(1))
    result = finetune(config)
    trained = {row.replace(", 0", "") for training, row in read if training}
    held_out = {row.replace(", 0", "") for training, row in read if not training}
    assert (result.held_out.examples, len(held_out)) == (8, 8)
    assert not trained & held_out
    assert result.held_out.after < result.held_out.before
    assert RunLog.read(tmp_path / "out").held_out == result.held_out

    again = config.model_copy(update={"out": str(tmp_path / "again")})
    stop_finetune(again, 7)
    resumed = finetune(again, resume=True)
    assert (resumed.losses, resumed.held_out) == (result.losses, result.held_out)
    silent = config.model_copy(update={"out": str(tmp_path / "silent"), "baseline": False})
    without = finetune(silent)
    assert (without.losses, without.held_out) == (result.losses, None)


def test_the_log_of_a_resumed_run_has_all_steps_and_one_first_evaluation(configure, text, tmp_path):
    config = configure(steps=4, save_every=2, eval_data=str(text), baseline=True)

    evaluations = []
    stop_finetune(config, 3)
    result = finetune(config, resume=True, on_eval=lambda step, _: evaluations.append(step))
    assert evaluations == [4]
    assert result.eval_loss_before is not None
    history = RunLog.read(tmp_path / "out").log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 4]


def test_a_folder_without_a_log_is_refused_by_name(tmp_path):
    expected = "expected the folder of a finished run of finetune, got"
    with pytest.raises(AdapterError, match=rf"{expected} a folder without log\.json"):
        RunLog.read(tmp_path)
    with pytest.raises(AdapterError, match=f"nowhere: {expected} no such folder"):
        RunLog.read(tmp_path / "nowhere")
