"""The harness's interface: what its own transformers backend finds, on one tiny model; rows; what is refused."""

import json
import pathlib
import shutil

import pytest

import runs
from efficientllm import convert, main
from efficientllm.errors import UserError
from efficientllm.evaluation import lm_eval_tasks
from efficientllm.metrics.reading import Reading

TASKS = pathlib.Path(__file__).parent / "tasks"
pytestmark = pytest.mark.xdist_group("harness")
TEXT = "The sky is blue and the sea is cold in winter. A dog is an animal; two and two are four.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of transformers with a byte-level tokenizer that puts a bos before a text, and local tasks."""
    pytest.importorskip("lm_eval")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    where = tmp_path_factory.mktemp("harness")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **named)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    tokenizer.save_pretrained(where / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.4, **shape, **ids)
    transformers.LlamaForCausalLM(config).eval().save_pretrained(where / "model")
    shutil.copytree(TASKS, where / "tasks")
    for file in (where / "tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace("DATA", str(where / "tasks" / "questions.jsonl")))
    runs.corpus(where / "texts")
    return where


@pytest.fixture(scope="module")
def both(folder):
    """`(ours, the harness's own)`."""
    import flax.linen as nn
    from lm_eval.models.huggingface import HFLM

    from efficientllm import model
    from efficientllm.evaluation.lm_eval_model import Harness
    from efficientllm.registry import build

    source = convert.open_source(folder / "model")
    lm = source.lm().clone(scan=False)
    params = source.load(nn.unbox(model.abstract_params(lm)), lm=lm)
    tokenizer = build("tokenizer", source.tokenizer()).fit(None)
    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
    return Harness(lm, params, tokenizer, source.max_positions, batch_size=3), theirs


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, request, index) for index, request in enumerate(arguments)]


@pytest.mark.slow
def test_log_likelihoods_are_the_harness_s_own(both):
    long = TEXT * 3  # more than the model's positions: its start is lost
    pairs = [("A dog is", " an animal"), ("", "The sky"), ("A dog is ", "a"), (long, " cold"), ("<s>The sea", " is")]
    pairs += [("The sky", TEXT[7:60])]
    actual, expected = (model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True) for model in both)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert [value for value, _ in actual] == pytest.approx([value for value, _ in expected], rel=1e-4)
    # Of all tokens one is the likeliest.
    every = [(None, both[0].tok_encode("A dog"), [id]) for id in range(300)]
    ours, theirs = ([greedy for _, greedy in model._loglikelihood_tokens(every, disable_tqdm=True)] for model in both)
    assert ours == theirs and sum(ours) == 1


@pytest.mark.slow
def test_whole_texts_are_scored_as_the_harness_does(both):
    texts = [(TEXT,), (TEXT * 4,)]
    actual, expected = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in both)
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_answers_are_the_harness_s_own(both):
    settings = {"until": ["e"], "max_gen_toks": 12}
    free = {"max_gen_toks": 12}
    prompts = [("A dog", free), ("The sea is cold", settings), ("Two", settings), (TEXT * 4, free), ("<s>The", free)]
    actual, expected = (model.generate_until(asked("generate_until", *prompts)) for model in both)
    assert actual == expected and len(set(actual)) > 2


@pytest.mark.slow
def test_a_row_holds_the_tasks_that_its_config_names(folder, both, tmp_path):
    from lm_eval import evaluator

    names = ("local_choice", "local_answer")
    flags = {
        "model.pretrained": folder / "model",
        "data": f"text(path='{folder}/texts/*.txt')",
        "train.length": 32,
        "eval.batches": 1,
        "infer.prompts": ("Hi",),
        "infer.max_new_tokens": 4,
        "infer.prompt_length": 8,
        "infer.repeats": 2,
        "quality.tasks": names,
        "quality.include": folder / "tasks",
    }
    argv = [f"--config={runs.ROOT}/configs/infer.py:float32", f"--workdir={tmp_path}/run"]
    assert main.main([*argv, *(f"--config.{key}={value}" for key, value in flags.items())]) == 0
    row = json.loads((tmp_path / "run" / "record.json").read_text())["quality"]
    expected = evaluator.simple_evaluate(
        both[1],
        tasks=list(names),
        apply_chat_template=True,
        task_manager=lm_eval_tasks._task_manager(names, str(folder / "tasks")),
    )["results"]
    assert row["local_choice_acc"] == expected["local_choice"]["acc,none"]
    assert row["local_choice_acc_norm"] == expected["local_choice"]["acc_norm,none"]
    assert row["local_answer_exact_match"] == expected["local_answer"]["exact_match,none"]
    again = lm_eval_tasks.readings_of_file(str(tmp_path / "run" / "results.json"))
    assert again["local_choice_acc"].value == row["local_choice_acc"]


def results(file, **values):
    """A results.json of the study's six, whose metrics are 0.1, 0.2..."""
    scores = {task: {f"{metric},none": (i + 1) / 10} for i, (task, metric) in enumerate(lm_eval_tasks.STUDY.items())}
    scores["leaderboard_mmlu_pro"] |= {"acc_stderr,none": 0.01, "alias": "mmlu"}
    file.write_text(json.dumps({"results": scores, "lm_eval_version": "0.4.13"} | values))
    return str(file)


def test_the_study_s_mean_has_six_tasks_and_no_weights(tmp_path):
    readings = lm_eval_tasks.readings_of_file(results(tmp_path / "results.json"))
    assert readings["study_quality"].value == pytest.approx(0.35) and len(readings) == 7
    assert readings["leaderboard_mmlu_pro_acc"] == Reading(0.1, "1", "results.json: lm-eval 0.4.13")
    five = json.loads((tmp_path / "results.json").read_text())
    five["results"].pop("leaderboard_musr")
    assert "study_quality" not in lm_eval_tasks.readings(five, "x")
    assert lm_eval_tasks.names(("study", "hellaswag", "leaderboard_bbh")) == [*lm_eval_tasks.STUDY, "hellaswag"]


def test_what_is_no_results_file_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text('{"results": {')
    for file, message in (
        ("/nowhere.json", "cannot be read"),
        (tmp_path / "broken.json", "not JSON"),
        (results(tmp_path / "list.json", results=[]), "no 'results' in it"),
    ):
        with pytest.raises(UserError, match=message):
            lm_eval_tasks.readings_of_file(str(file))
