"""Which rows make a step, and whole runs of the trainer in this process: one loss a step, frozen weights frozen, resume exact to the bit."""

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_finetune.options import parse_options
from falcon_finetune.packed_falcon import pack_rows
from falcon_finetune.quantization import decoder_linears
from falcon_finetune.tiny_falcon import byte_tokenizer
from falcon_finetune.training import FalconTrainer, StepCollator, StepSampler, cut_into_micro_batches
from tests.falcons import CPU, adapt, load_random, random_rows, tiny_config

# ------------------------------------------------------------------------------------------------------------- rows of a step


def rows_of_steps(rows: int, rows_per_step: int, steps: int, world_size: int = 1, seed: int = 0) -> list[list[int]]:
    """The rows of each step, those of rank 0 first."""
    ranks = [list(StepSampler(rows, rows_per_step, steps, seed, rank, world_size)) for rank in range(world_size)]
    return [sum(shares, []) for shares in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", (2, 4))
def test_ranks_share_the_rows_of_a_step_in_its_order(world_size):
    assert rows_of_steps(10, 4, 9, world_size) == rows_of_steps(10, 4, 9)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 30), rows_per_step=st.integers(1, 20), seed=st.integers(0, 2**31 - 1))
def test_epochs_are_permutations_without_a_seam(rows, rows_per_step, seed):
    steps = -(-3 * rows // rows_per_step)
    taken = rows_of_steps(rows, rows_per_step, steps, seed=seed)
    assert all(len(step) == rows_per_step for step in taken)  # the last step of an epoch is as large as any other
    stream = sum(taken, [])
    epochs = [stream[start : start + rows] for start in range(0, 3 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)


def test_epochs_and_seeds_differ():
    one, two = (rows_of_steps(50, 50, 2, seed=seed) for seed in (0, 1))
    assert one[0] != one[1] and one[0] != two[0] and one[1] != two[1]
    assert rows_of_steps(50, 50, 2) == one
    assert len(StepSampler(50, 5, 7, 0)) == 7


def tokens_of(batches) -> list[int]:
    return torch.cat([batch.input_ids for batch in batches]).tolist()


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), budget=st.integers(1, 80))
def test_micro_batches_keep_order_and_budget(lengths, budget):
    rows = random_rows(tuple(lengths))
    batches = cut_into_micro_batches(rows, budget, first_slot=5)
    assert tokens_of(batches) == [token for row in rows for token in row["input_ids"]]
    assert all(sum(batch.bounds.lengths) <= budget or len(batch.bounds.lengths) == 1 for batch in batches)
    for before, after in zip(batches, batches[1:]):  # as few as the order allows
        assert sum(before.bounds.lengths) + after.bounds.lengths[0] > budget
    slots = torch.cat([batch.token_ids for batch in batches]) // (1 << 16)
    assert slots.unique_consecutive().tolist() == list(range(5, 5 + len(rows)))


def test_the_collator_counts_and_places_rows():
    rows = random_rows((6, 3, 8, 2), prompt=2)
    whole = StepCollator(1000, 0)(rows)
    assert (whole["rows"], whole["tokens"], whole["learnt_tokens"]) == (4, 19, 4 + 1 + 6 + 0)
    assert len(whole["micro_batches"]) == 1
    # Two ranks, each with micro-batches of its own, address the same places as one rank does.
    shares = StepCollator(7, 0)(rows[:2])["micro_batches"] + StepCollator(7, 2)(rows[2:])["micro_batches"]
    assert torch.equal(torch.cat([batch.token_ids for batch in shares]), whole["micro_batches"][0].token_ids)
    assert tokens_of(shares) == tokens_of(whole["micro_batches"])


# ------------------------------------------------------------------------------------------------------------------ whole runs


def run(folder, *flags: str, steps: int = 5, mode: str = "4bit", micro_batch_tokens: int = 60, resume_from=None, evaluates: bool = False):
    """Trains a tiny Falcon on 10 rows, 4 a step: an epoch ends inside the third step."""
    arguments = ["-b", "4", "--lora_r", "8", "--learning_rate", "1e-2", "--checkpoint_steps", "1", "-o", str(folder), *flags]
    model = adapt(load_random(tiny_config("7b"), mode)[0], *arguments)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = random_rows((20, 31, 12, 25, 18, 9, 40, 22, 17, 28))
    trainer = FalconTrainer(model=model, options=parse_options([*arguments, "-s", str(steps)]), device=CPU, micro_batch_tokens=micro_batch_tokens,
                            steps=steps, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:5]) if evaluates else None,
                            tokenizer=byte_tokenizer())  # fmt: skip
    at_start = adapters_of(trainer.model)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, before, at_start


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), "--lora_dropout", "0.1")


@pytest.mark.parametrize("mode", ("4bit", "8bit", "16bit"))
def test_the_trainer_keeps_the_adapters_in_float32(mode, tmp_path):
    trainer, before, at_start = run(tmp_path, steps=1, mode=mode)
    for name, parameter in at_start.items():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, before[name]), name
    trained = adapters_of(trainer.model)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32, name
        assert (parameter.bfloat16().float() != parameter).float().mean() > 0.9, name  # not what a pass through bf16 leaves


def test_adapters_learn_and_the_base_does_not_change(undisturbed):
    trainer, before, _ = undisturbed
    after = dict(trainer.model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        if "lora_" in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
    fresh = dict(decoder_linears(load_random(tiny_config("7b"), "4bit")[0]))
    for name, module in decoder_linears_of(trainer.model):
        assert torch.equal(module.weight.quant_state.absmax, fresh[name].weight.quant_state.absmax)


def decoder_linears_of(model):
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield name.removeprefix("base_model.model.").removesuffix(".base_layer"), module


def test_every_step_has_one_loss_that_is_the_mean_over_its_learnt_tokens(undisturbed):
    trainer, before, _ = undisturbed
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    assert all(entry["learning_rate"] == pytest.approx(1e-2) and entry["grad_norm"] > 0 for entry in entries)
    assert entries[-1]["epoch"] == pytest.approx(5 * 4 / 10)
    model = adapt(load_random(tiny_config("7b"), "4bit")[0], "--lora_r", "8", "--lora_dropout", "0.1")
    rows = [trainer.train_dataset[index] for index in next(iter(StepSampler(10, 4, 1, 0)))]
    with torch.no_grad():
        packed = pack_rows(rows)
        first = model(packed=packed, dropout_key=1).item() / len(packed.targets)
    assert losses_of(trainer)[0] == pytest.approx(first, rel=1e-5)
    assert len(trainer.step_tokens) == len(trainer.speed()["step_seconds"]) == 5
    assert trainer.step_tokens[0] == len(packed.input_ids)


@pytest.mark.parametrize("step", (1, 2, 4))
def test_a_resumed_run_ends_in_the_same_bits(step, undisturbed, tmp_path):
    trainer, _, _ = undisturbed
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{step}"
    if step < 4:  # the two newest are kept: make the earlier one in a run that was cut short
        run(tmp_path / "cut", "--lora_dropout", "0.1", steps=step)
        checkpoint = str(tmp_path / "cut" / f"checkpoint-{step}")
    resumed, _, _ = run(tmp_path / "resumed", "--lora_dropout", "0.1", resume_from=checkpoint)
    expected = adapters_of(trainer.model)
    for name, parameter in adapters_of(resumed.model).items():
        assert torch.equal(parameter, expected[name]), name
    assert losses_of(resumed) == losses_of(trainer)
    assert len(resumed.step_tokens) == 5 - step


@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_runs_that_are_equal_by_definition_are_equal(mode, tmp_path):
    one, _, _ = run(tmp_path / "one", steps=3, mode=mode, micro_batch_tokens=10_000)
    cut, _, _ = run(tmp_path / "cut", steps=3, mode=mode, micro_batch_tokens=1)
    assert losses_of(cut) == pytest.approx(losses_of(one), rel=1e-5)
    expected = adapters_of(one.model)
    for name, parameter in adapters_of(cut.model).items():
        assert ((parameter - expected[name]).norm() / expected[name].norm()).item() < 1e-4, name


def test_accumulation_is_a_larger_batch(tmp_path):
    def options(*flags: str):
        return parse_options([*flags, "-o", str(tmp_path)])

    one, two = options("-b", "4"), options("-b", "2", "--gradient_accumulation_steps", "2")
    assert one.rows_per_step(1) == two.rows_per_step(1) == options("-b", "2").rows_per_step(2) == 4


def test_evaluation_is_the_mean_over_all_learnt_tokens_and_disturbs_nothing(undisturbed, tmp_path):
    trainer, _, _ = run(tmp_path, "--lora_dropout", "0.1", "--eval_fraction", "0.5", "--eval_steps", "2", evaluates=True)
    assert losses_of(trainer) == losses_of(undisturbed[0])
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [step for step, _ in evaluations] == [2, 4]  # finetune.py itself evaluates after the last step
    loss = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    with torch.no_grad():
        packed = pack_rows(list(trainer.eval_dataset))
        expected = trainer.model(packed=packed).item() / len(packed.targets)
    assert loss == pytest.approx(expected, rel=1e-6)
