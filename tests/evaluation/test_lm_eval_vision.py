"""The harness's tasks with images: what its own transformers backend answers, on one tiny model; rows and refusals."""

import json

import pytest
from ml_collections import ConfigDict

import runs
from convert import vision_folders as folders
from efficientllm import convert, main
from efficientllm.data import charts
from efficientllm.errors import UserError
from efficientllm.vision.processors import read_processor

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.xdist_group("harness"), pytest.mark.slow]
IMAGE, SIDE = 290, 56


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with a byte-level tokenizer and the processor of its pictures."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    where = tmp_path_factory.mktemp("harness")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", *(f"<{number}>" for number in range(IMAGE - 258)), "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(["What is the value of this?"], trainer)
    image = backend.token_to_id("<image>")
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = folders.transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    size = {"shortest_edge": SIDE}
    images = folders.transformers.CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
    folders.transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(where / "model")
    text = folders.MODELS["llava"][1]["text_config"] | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    built = folders.build("llava", text_config=text | {"pad_token_id": 1}, image_token_index=image)
    built.generation_config.eos_token_id = 1
    built.save_pretrained(where / "model")
    runs.corpus(where / "texts")
    return where


@pytest.fixture(scope="module", autouse=True)
def small_charts(tmp_path_factory):
    """Draws charts() once, in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(charts.Charts, "count", 200)
        patch.setattr(charts.Charts.__init__, "__defaults__", (200, *charts.Charts.__init__.__defaults__[1:]))
        yield


@pytest.fixture
def ours(folder):
    import flax.linen as nn

    from efficientllm import model
    from efficientllm.evaluation.lm_eval_vision import VisionHarness
    from efficientllm.registry import build

    source = convert.open_source(folder / "model")
    lm = source.lm().clone(scan=False)
    params = source.load(nn.unbox(model.abstract_params(lm)), lm=lm)
    tokenizer = build("tokenizer", source.tokenizer()).fit(None)
    return VisionHarness(read_processor(folder / "model", lm), lm, params, tokenizer, 256, batch_size=2)


@pytest.fixture
def task_manager():
    from efficientllm.evaluation import lm_eval_tasks

    return lm_eval_tasks.task_manager(ConfigDict({"tasks": ("charts",), "include": ""}))


@pytest.mark.parametrize("chat", [False, True])
def test_answers_to_charts_are_the_harness_s_own(folder, ours, task_manager, chat):
    from lm_eval import evaluator
    from lm_eval.models.hf_vlms import HFMultimodalLM

    theirs = HFMultimodalLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
    answers = []
    for model in (ours, theirs):
        results = evaluator.simple_evaluate(
            model, tasks=["charts"], limit=6, task_manager=task_manager, apply_chat_template=chat, bootstrap_iters=0
        )
        answers.append([sample["resps"][0][0] for sample in results["samples"]["charts"]])
    assert answers[0] == answers[1]
    assert any(answers[0]) and len(set(answers[0])) > 1


def test_a_row_holds_accuracy_and_its_controls(folder, tmp_path):
    values = {
        "model.pretrained": folder / "model",
        "tokenizer": "pretrained",
        "data": f"text(path='{folder}/texts/*.txt')",
        "train.length": 32,
        "eval.batches": 1,
        "infer.chat": False,
        "infer.prompts": ("Hi",),
        "infer.max_new_tokens": 4,
        "infer.prompt_length": 8,
        "infer.repeats": 2,
        "quality.tasks": ("charts", "charts_blank", "charts_other"),
        "quality.limit": 4,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    assert main.main([f"--config={runs.ROOT}/configs/infer_vl.py:float32", f"--workdir={tmp_path}/run", *flags]) == 0
    quality = json.loads((tmp_path / "run/record.json").read_text())["quality"]
    for task in values["quality.tasks"]:
        assert {f"{task}_{metric}" for metric in ("strict", "relaxed", "relaxed_value")} <= quality.keys()


def test_what_is_refused(ours):
    from lm_eval.api.instance import Instance
    from PIL import Image

    picture = Image.new("RGB", (60, 60))
    request = Instance("generate_until", {}, ("<image>" + "a" * 300, {"max_gen_toks": 8}, {"visual": [picture]}), 0)
    with pytest.raises(UserError, match="316 tokens with those of its images; 248 fit before the answer"):
        ours.generate_until([request])
    request.arguments = ("a", {"max_gen_toks": 8}, {"visual": [picture]})
    with pytest.raises(UserError, match="0 image tokens .* and 1 images"):
        ours.generate_until([request])
    request.arguments = ("a", {"max_gen_toks": 8}, {"visual": [], "audio": [b""]})
    with pytest.raises(UserError, match="document .*: has 'audio' beside its text: images alone are read"):
        ours.generate_until([request])
    request.arguments = ("<video>a", {"max_gen_toks": 8}, {"visual": [picture]})
    with pytest.raises(UserError, match="<video> in its text: videos are not read"):
        ours.generate_until([request])
    with pytest.raises(UserError, match="scores continuations of images"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("<image>", "a", {"visual": [picture]}), 0)])
