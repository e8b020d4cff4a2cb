"""Records to tune on: prompts with responses, or conversations, from the user's files or the hub."""

import dataclasses

from efficientllm.data import conversation
from efficientllm.data.files import _Files, check_json_lines, check_parquet, library
from efficientllm.data.hub import Hub
from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class _Records(_Files):
    """`path` is a glob of .jsonl or .parquet files, or with `hub` a data set of the hub (`name` its configuration), of
    which `split` is read."""

    hub: bool = False
    name: str = ""
    split: str = "train"
    held_out: float = 0.05

    records = True

    def key(self):
        """Changes when a file or a field does."""
        return f"{self} {self._hub().key()}" if self.hub else super().key()

    def documents(self):
        """Yields (conversation as JSON text, what decides its side of the split).

        Raises UserError naming the file and record for a missing field or one of another type.
        """
        for index, row in enumerate(self._rows()):
            text = conversation.dump(self._messages(row, f"data path={self.path!r}, record {index}"))
            yield text, text

    def _hub(self):
        return Hub(self.path, name=self.name, split=self.split, held_out=self.held_out)

    def _rows(self):
        if self.hub:
            yield from self._hub().rows()
            return
        datasets, paths = library(), self._paths()
        kinds = {path.rpartition(".")[2] for path in paths}
        builder, check = {"parquet": ("parquet", check_parquet)}.get("".join(kinds), ("json", check_json_lines))
        for path in paths:
            check(path)
        try:
            yield from datasets.load_dataset(builder, data_files=paths, split="train", streaming=True)
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data path={self.path!r}: `datasets` cannot read it ({_line(error)})") from error

    def _field(self, row, field, where):
        if field not in row:
            raise UserError(f"{where}: no field {field!r}; there are: {', '.join(row)}{did_you_mean(field, row)}")
        return row[field]


@register("data", "pairs")
@dataclasses.dataclass(frozen=True)
class Pairs(_Records):
    """A prompt and a response a record; with `system`, a system message ahead of each."""

    prompt: str = "prompt"
    response: str = "response"
    system: str = ""

    def _messages(self, row, where):
        texts = {}
        for field in (self.prompt, self.response):
            texts[field] = self._field(row, field, where)
            if not isinstance(texts[field], str) or not texts[field].strip():
                raise UserError(f"{where}: field {field!r} holds {texts[field]!r:.40}, no text")
        turns = [("system", self.system)] if self.system else []
        turns += [("user", texts[self.prompt]), ("assistant", texts[self.response])]
        return [{"role": role, "content": content} for role, content in turns]


@register("data", "chat")
@dataclasses.dataclass(frozen=True)
class Chat(_Records):
    """A list of messages with `role` and `content` a record, in the field `messages`."""

    messages: str = "messages"

    def _messages(self, row, where):
        return conversation.check(self._field(row, self.messages, where), where)


def _line(error):
    return " ".join(str(error).split())
