"""Model interface of the lm-evaluation-harness for tasks with images, as its transformers backend for them."""

import copy
import typing
from collections.abc import Sequence

import numpy as np
from lm_eval.api.instance import Instance

from efficientllm.data import videos
from efficientllm.embeds.vision_language import VisionLM
from efficientllm.errors import UserError, error_prefix
from efficientllm.evaluation.lm_eval_model import Harness
from efficientllm.infer.vision_serving import VisionEngine
from efficientllm.vision.conversations import marked_token, place_pictures, template_messages
from efficientllm.vision.processors import Processor, load_picture
from efficientllm.vision.token_rows import Prompt, token_repeats

PLACE = "<image>"  # of an image in the harness's contexts


class VisionHarness(Harness):
    """Answers requests with images, `context, settings, {"visual": [PIL images]}`, and those of text.

    A context is never cut within its images: one that is too long is refused.
    """

    MULTIMODAL = True  # without it the harness leaves tasks with images out

    lm: VisionLM

    def __init__(self, processor: Processor, *args: typing.Any, **kwargs: typing.Any) -> None:
        super().__init__(*args, **kwargs)
        self.processor, self._is_chat = processor, False

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """Puts each place of an image where the template has it."""
        self._is_chat = True
        count = sum(message["content"].count(PLACE) for message in chat_history)
        messages = place_pictures(copy.deepcopy(chat_history), count, "a context")
        return super().apply_chat_template(
            template_messages(messages, count, self.lm, self.own_tokenizer), add_generation_prompt
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations of texts. Raises UserError for requests with images, of which the harness has none."""
        if requests and len(requests[0].args) > 2:
            raise UserError("a task scores continuations of images; those that generate answers can be run")
        return super().loglikelihood(requests, disable_tqdm)

    def _prompt(self, request, most):
        if len(request.args) < 3:
            return super()._prompt(request, most)
        name = f"{request.task_name or 'a task'}, document {request.doc_id}"
        pictures = _pictures(request, name)
        ids = np.asarray(self._encode(request.args[0]), np.int32)
        with error_prefix(name):
            counts = [self.processor.tokens(picture.height, picture.width) for picture in pictures]
        ids = np.repeat(ids, token_repeats(ids, counts, self.lm.image_token, name))
        if len(ids) > most:
            raise UserError(f"{name}: {len(ids)} tokens with those of its images; {most} fit before the answer")
        return ids.tolist()

    def _encode(self, context):
        token = self.own_tokenizer.text_of(self.lm.image_token)
        if self._is_chat:
            return self.own_tokenizer.encode_template(context)
        return self.tok_encode(context.replace(PLACE, marked_token(token)))

    def _engine(self, requests, sampler, length):
        records = _Records(self, requests, self.max_length)
        end_ids = self.own_tokenizer.end_ids
        return VisionEngine(records, self.lm, self.params, sampler, end_ids, length, True)


def _pictures(request, name):
    """The images of a request. Raises UserError for one with a video, a sound or something else beside them."""
    videos.refuse_places(request.args[0], name)
    media = request.args[2]
    if other := next((kind for kind in media if kind != "visual"), None):
        raise UserError(f"{name}: has {other!r} beside its text: images alone are read; leave the task out")
    return media["visual"]


class _Records(Sequence):
    """Prompts of requests, whose images become patches when a batch of them is taken: all would not fit."""

    def __init__(self, harness, requests, most):
        self.harness, self.requests, self.most = harness, requests, most

    def __len__(self):
        return len(self.requests)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        request, harness = self.requests[index], self.harness
        pictures = _pictures(request, "a task") if len(request.args) > 2 else ()
        prepared = [harness.processor.prepare(load_picture(picture, "an image of a task")) for picture in pictures]
        return Prompt(harness._prompt(request, self.most), prepared)
