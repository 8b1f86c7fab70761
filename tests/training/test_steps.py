"""Schedules count optimizer steps, also when gradients are accumulated, interrupted or trained again."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from crossways.models import CrosswaysForCausalLM
from crossways.training.steps import OptimizerSteps
from crossways.training.trainer import CrosswaysTrainer

SCHEDULE = {"select": {"name": "scheduled_top_k", "k": 1, "k_end": 4, "steps": 3}, "gate": "random"}


class Windows(torch.utils.data.Dataset):
    """Ten windows of eight tokens."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        ids_S = torch.randint(1, 37, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids_S, "labels": ids_S}


@pytest.fixture
def trainer_of(tmp_path):
    """Builds a trainer of batches of two, so of five batches per epoch."""

    def build(model, kind=CrosswaysTrainer, folder="run", **arguments):
        defaults = {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), **(defaults | arguments))
        return kind(model=model, args=arguments, train_dataset=Windows())

    return build


def chosen_per_pass(model):
    """Fills with the experts per token of the first router, pass by pass."""
    seen = []

    def note(module, args, kwargs, output):
        if module.training:
            seen.append(int(output.expert_load[0].sum()) / kwargs["input_ids"].numel())

    model.register_forward_hook(note, with_kwargs=True)
    return seen


def test_passes_of_one_step_share_its_count(tiny, trainer_of):
    model = tiny(**SCHEDULE)
    seen = chosen_per_pass(model)
    trainer_of(model, max_steps=5, gradient_accumulation_steps=2).train()
    # five batches per epoch: steps of 2, 2 and 1 passes, then 2 and 2; k is 1, 2, 3, 4, 4
    assert seen == [1, 1, 2, 2, 3, 4, 4, 4, 4]
    assert model.model.training_passes == 5


def test_a_killed_run_goes_on_at_its_step(tiny, trainer_of):
    whole, killed = (tiny(**SCHEDULE, initializer_range=0.1) for _ in range(2))
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 2}
    trainer_of(whole, folder="whole", **settings).train()
    killed_trainer = trainer_of(killed, folder="killed", **settings)
    killed_trainer.train()
    resumed = tiny(**SCHEDULE, initializer_range=0.1)
    seen = chosen_per_pass(resumed)
    checkpoint = f"{killed_trainer.args.output_dir}/checkpoint-2"
    assert CrosswaysForCausalLM.from_pretrained(checkpoint).model.training_passes == 2
    trainer_of(resumed, folder="killed", **settings).train(resume_from_checkpoint=checkpoint)
    assert seen == [3, 4, 4]  # the epoch's last step has one pass
    assert resumed.model.training_passes == 4
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name


def test_training_again_goes_on_counting(tiny, trainer_of):
    model = tiny(**SCHEDULE)
    trainer_of(model, max_steps=2, gradient_accumulation_steps=2).train()
    trainer_of(model, folder="again", max_steps=1).train()
    assert model.model.training_passes == 3
    model.train()(torch.ones(1, 4, dtype=torch.long))  # without a trainer passes count
    assert model.model.training_passes == 4


def test_any_trainer_counts_steps_with_the_callback_and_passes_without(tiny, trainer_of):
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "remove_unused_columns": False}
    with_it, without = tiny(**SCHEDULE), tiny(**SCHEDULE)
    trainer = trainer_of(with_it, Trainer, **settings)
    trainer.add_callback(OptimizerSteps)
    trainer.train()
    trainer_of(without, Trainer, "without", **settings).train()
    assert with_it.model.training_passes == 2
    assert without.model.training_passes == 4


def test_models_without_a_schedule_are_left_alone(tiny, trainer_of):
    model = tiny()
    trainer_of(model, max_steps=1).train()
    assert "model.training_passes" not in model.state_dict()


def test_a_bias_moves_once_for_all_passes_of_a_step(tiny, trainer_of):
    model = tiny(score="sigmoid", bias_update_rate=0.5)
    loads = []
    model.register_forward_hook(lambda module, args, output: loads.append(output.expert_load[0].float()))
    trainer_of(model, max_steps=1, gradient_accumulation_steps=2).train()
    load_E = loads[0] + loads[1]
    assert torch.equal(model.model.routers[0].bias, 0.5 * torch.sign(load_E.mean() - load_E))


def test_a_killed_run_goes_on_with_its_prices(tiny, trainer_of):
    fields = {"quantile_balancing": True, "quantile_momentum": 0.5}
    whole, resumed = tiny(**fields), tiny(**fields)
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 2}
    trainer = trainer_of(whole, **settings)
    trainer.train()
    trainer_of(resumed, **settings).train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert whole.model.routers[0].bias.any()
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name
