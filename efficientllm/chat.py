"""Chat with a model in the terminal.

  python -m efficientllm.chat MODEL [--system=TEXT] [--config=infer:FORM] [--config.key=value ...]

  MODEL            a value of config.model.pretrained: a folder, a GGUF file, owner/name of the hub, smollm2-135m, the
                   folder of a run that trained or tuned (runs/NAME/HASH), or one of an adapter (.../adapter)
  --system=TEXT    the system message
  --config=infer:FORM   the format of its weights: bfloat16 (default), float32, float16, int8, int4, nf4, stored
  --config.key=value    as for infer: --config.infer.sampler='sample(temperature=0.7)' --config.infer.max_new_tokens=256

/reset forgets the conversation. /exit or the end of input leaves. Ctrl-C stops an answer, a second one leaves. Lines
of a pipe are answered one after the other. Answers go to standard output, all else to standard error. Nothing is
written to disk.
"""

import contextlib
import signal
import sys

from efficientllm.config.field_keys import name_keys
from efficientllm.errors import UserError
from efficientllm.runtime import console, malloc
from efficientllm.typing import Config

MAX_NEW_TOKENS = 512  # of an answer, unless config.infer.max_new_tokens is set on the command line


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        config, system, new_tokens = parse(argv)
        # These import JAX: not before the command line is checked.
        from efficientllm.registry.plugins import import_plugins
        from efficientllm.runtime import compile_cache

        import_plugins(config.imports)
        with compile_cache.of_run(config.compile_cache):
            return Chat(config, system, new_tokens).run()
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> tuple[Config, str, int | None]:
    """Parses a command line into `(config, system message, max_new_tokens or None)`. Raises UserError."""
    from efficientllm import main as command

    models = [argument for argument in argv if not argument.startswith("-")]
    system = [argument.partition("=")[2] for argument in argv if argument.startswith("--system=")]
    rest = [argument for argument in argv if argument.startswith("-") and not argument.startswith("--system=")]
    if len(models) != 1:
        raise UserError(f"MODEL: one is needed, not {len(models)}; try python -m efficientllm.chat smollm2-135m")
    for argument in rest:
        if argument.lstrip("-").split("=")[0] in ("workdir", "overwrite", "init", "system"):
            raise UserError(f"{argument}: no such flag; flags: --system=TEXT, --config=infer:FORM, --config.key=value")
    preset = [] if any(argument.startswith("--config=") for argument in rest) else ["--config=infer:bfloat16"]
    config, _, _ = command.parse([*preset, *rest, f"--config.model.pretrained={models[0]}"])
    sets_length = any(argument.startswith("--config.infer.max_new_tokens") for argument in rest)
    new_tokens = config.infer.max_new_tokens if sets_length else None
    if config.task != "infer":
        raise UserError(f"config.task = {config.task!r}: a chat needs infer; take a preset such as --config=infer:int4")
    return config, "".join(system[-1:]), new_tokens


class Chat:
    """A conversation, from loading the model to the summary at its end."""

    def __init__(self, config: Config, system: str, new_tokens: int | None):
        self.config, self.system, self._max_new_tokens = config, system, new_tokens
        self._interrupts = 0

    def run(self) -> int:
        """Loads the model, answers until the input ends, and returns the exit status."""
        import jax

        from efficientllm.infer import serving, setup

        try:
            with name_keys(self.config):
                self.serving = setup.prepare(self._smallest_request(), with_text=False)
                with jax.set_mesh(self.serving.mesh):
                    self._load()
                    return self._talk()
        except serving.OutOfMemory as error:
            raise UserError(str(error)) from None
        except BrokenPipeError:  # whoever read the answers has gone
            sys.stdout = None
            return 0

    def _smallest_request(self):
        """The config with a prompt of one token: what can be checked before the first question."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.infer.update({"prompts": ("a",), "chat": False, "max_new_tokens": 1, "prompt_length": 1})
            config.infer.update({"batch_size": 1, "baseline": ""})
            config.quality.tasks = ()
        return config.lock()

    def _load(self):
        from efficientllm.infer.chat_session import LONGEST, Dialogue, Session, Times
        from efficientllm.weights import resident_bytes

        run = self.serving
        is_chat = run.source is not None and run.source.trained_on_conversations
        self.dialogue = Dialogue(run.tokenizer, self.system, is_chat)
        self.dialogue.ask("a")  # raises now if the template refuses the system message
        self.dialogue.reset()
        params = run.load(self.config.quant, self.config.infer.rules)
        self.weights = f"weights {resident_bytes(params) / 1e6:,.1f} MB as {self.config.quant}"
        most = min(run.max_positions or LONGEST, LONGEST * 16)
        self.session = Session(run.lm, params, run.sampler, self.dialogue.end_ids, most)
        self.new_tokens = self._max_new_tokens or min(MAX_NEW_TOKENS, most // 2)
        _say(f"{self.config.model.pretrained}: {self.weights}, {most:,} tokens of conversation; compiling")
        self.session.warm_up()
        self.times = Times()
        if self.dialogue.form == "text":
            _say("no chat template: the model continues the text, and what you write is appended to it")

    def _talk(self):
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing for input()
            _say("/reset forgets, /exit leaves, Ctrl-C stops an answer")
        status = 0
        for line in _lines(is_terminal):
            if line is None:
                status = 130
                break
            if line.strip() == "/exit":
                break
            if line.strip() == "/reset":
                self.dialogue.reset()
                _say("the conversation is forgotten")
            elif line.strip() and self._answer(line):
                status = 130
                break
        state = self._state_bytes() / 1e6
        _say(f"{self.times}; {self.weights}, state {state:,.1f} MB for {self.session.length:,} tokens")
        return status

    def _state_bytes(self):
        from efficientllm.cost import formulas

        return formulas.state_bytes(self.serving.lm, self.session.length)

    def _answer(self, text):
        """Answers on standard output. Returns whether to leave."""
        from efficientllm.infer.streaming import Stream, cut

        try:
            ids = self._fit_context(self.dialogue.ask(text))
        except UserError as error:
            _say(f"efficientllm: {error}")
            return False
        tokenizer, stops = self.serving.tokenizer, self.config.infer.stop
        stream, answer_ids, shown = Stream(_write, stops), [], ""
        with self._interruptible():
            for answer_ids in self.times.watched(self.session.answer(ids, self.new_tokens, self._stopped)):
                has_ended = answer_ids[-1] in self.dialogue.end_ids
                shown = tokenizer.decode(answer_ids[:-1] if has_ended else answer_ids)
                stream.show(shown)
        stream.show(shown, finished=True)
        _write("\n")
        self.dialogue.answered(answer_ids, cut(shown, stops))
        return self._interrupts > 1

    def _fit_context(self, ids):
        """`ids` without the oldest turns that have no room. Raises UserError if the last turn has none."""
        room = self.session.most - self.new_tokens
        ids, dropped = self.dialogue.within(ids, room)
        if ids is None:
            raise UserError(
                f"config.infer.max_new_tokens = {self.new_tokens}: more than the model's {self.session.most} "
                f"positions, after a prompt of {dropped} tokens; write less, or set fewer"
            )
        if dropped:
            _say(f"the context is full: the oldest {dropped} question(s) and answer(s) are forgotten")
        return ids

    def _stopped(self, ids):
        stops = self.config.infer.stop
        return self._interrupts > 0 or any(stop in self.serving.tokenizer.decode(ids) for stop in stops)

    @contextlib.contextmanager
    def _interruptible(self):
        """Ctrl-C ends the answer after the step that is running; a second one leaves."""

        def count(signum, frame):
            self._interrupts += 1
            if self._interrupts > 2:
                raise KeyboardInterrupt

        self._interrupts = 0
        try:
            before = signal.signal(signal.SIGINT, count)
        except ValueError:  # only the main thread may set handlers
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _lines(is_terminal):
    """Yields the lines of standard input, and None when Ctrl-C was pressed twice."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    was_interrupted = False
    while True:
        try:
            line = input("> " if is_terminal else "")
            was_interrupted = False
            yield line
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                yield None
                return
            was_interrupted = True
            _say("\nCtrl-C once more, or /exit, leaves")


def _write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    malloc.restart_with_settings()
    sys.exit(main())
