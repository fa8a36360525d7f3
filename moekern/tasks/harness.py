"""lm-evaluation-harness as it is used here: the one module that imports it.

Tasks say what they ask, a model answers everything in one pass over its weights, and tasks score the answers. So the
harness runs twice over the same tasks: once to write down questions, and once for each model to look answers up.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError, first_line, nearest_name
from moekern.tasks.questions import Answer, Question, asked_of
from moekern.tasks.settings import Asked, Score

INSTALL = "pip install 'moekern[eval]'"
FEWSHOT_SEED, RANDOM_SEED, NUMPY_SEED = 1234, 0, 1234  # the harness's own: of examples, and of what tasks may draw
BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean
Written = tuple[str, str]  # what stands before an answer that is written, and its settings as JSON


def check_installed() -> None:
    """Raise InputError where lm-evaluation-harness is not installed."""
    try:
        import_module("lm_eval")
    except ImportError as error:
        raise InputError(f"--tasks: needs lm-evaluation-harness: {INSTALL}", kind="option") from error


@dataclass
class Tasks:
    """Loaded tasks. `own`: how many examples each has by itself; 0: it takes no others."""

    asked: Asked
    loaded: dict[str, Any]
    own: dict[str, int | None]
    tell: Callable[[str], None]
    told: set[str] = field(default_factory=set)

    def with_shots(self, shots: int | None) -> Iterator[tuple[str, Any]]:
        """The single tasks, with so many examples before each question."""
        for name, task in self.loaded["tasks"].items():
            own = self.own[name]
            if own == 0 and shots:
                self.say(f"{name}: its file says that it takes no examples: --shots {shots} is 0 for it")
            number = (own or 0) if shots is None or own == 0 else shots
            task.set_config(key="num_fewshot", value=number)
            task.set_fewshot_seed(seed=FEWSHOT_SEED + self.asked.seed)
            if self.asked.max_gen_toks is not None and task.get_config("output_type") == "generate_until":
                more = {"max_gen_toks": self.asked.max_gen_toks}
                task.set_config(key="generation_kwargs", value=more, update=True)
            yield name, task

    def say(self, text: str) -> None:
        """Once."""
        if text not in self.told:
            self.told.add(text)
            self.tell(text)

    def questions(self, shots: int | None, model: Any) -> None:
        """Have a model asked everything."""
        for name, task in self.with_shots(shots):
            with refusing(f"task {name}", self.say), seeds():
                task.build_all_requests(limit=self._limit(task), rank=0, world_size=1)
                kinds: dict[str, list[Any]] = {}
                for instance in task.instances:
                    kinds.setdefault(instance.request_type, []).append(instance)
                for kind, some in kinds.items():
                    getattr(model, kind)(some)

    def scores(self, shots: int | None, model: Any, name: str) -> Iterator[Score]:
        """Of a model that has all the answers."""
        from lm_eval.evaluator import evaluate

        list(self.with_shots(shots))
        with refusing(f"tasks {', '.join(self.asked.tasks)}", self.say), seeds():
            found = evaluate(
                model, self.loaded, limit=self.asked.limit, bootstrap_iters=BOOTSTRAP, log_samples=False, verbosity=None
            )
        for task, metrics in found["results"].items():
            higher = found.get("higher_is_better", {}).get(task, {})
            count = found.get("n-samples", {}).get(task, {}).get("effective")
            number = found.get("n-shot", {}).get(task, shots)
            for key, value in metrics.items():
                metric, comma, reading = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                    continue
                error = metrics.get(f"{metric}_stderr,{reading}")
                known = float(error) if isinstance(error, Real) and math.isfinite(error) else None
                yield Score(name, task, number, metric, reading, float(value), known, count, higher.get(metric))

    def lessons(self) -> Iterator[tuple[str, str, str]]:
        """Task, prompt and right answer of every example of the tasks' own training sets, as the harness asks them
        without examples. Raises InputError for a task that has none, or no right answer."""
        for name, task in self.with_shots(0):
            with refusing(f"task {name}", self.say), seeds():
                if not task.has_training_docs():
                    raise InputError(f"task {name}: its file names no training_split")
                found = [_lesson(name, task, doc) for doc in task.training_docs()]
            yield from ((name, *lesson) for lesson in found)

    def _limit(self, task: Any) -> int | None:
        from lm_eval.evaluator_utils import get_sample_size

        number = get_sample_size(task, self.asked.limit)
        return None if number is None else int(number)


def _lesson(name: str, task: Any, doc: Any) -> tuple[str, str]:
    """Prompt and right answer."""
    kind, context = task.get_config("output_type"), task.fewshot_context(doc, num_fewshot=0)
    if kind == "generate_until":
        return context, f"{task.config.target_delimiter}{task.doc_to_target(doc)}"
    asked = task.construct_requests(doc=doc, ctx=context, metadata=(name, 0, 1))
    number = 0
    if kind == "multiple_choice":
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = right[0] if isinstance(right, list) else right
        number = task.doc_to_choice(doc).index(right) if isinstance(right, str) else int(right)
    elif kind != "loglikelihood":
        raise InputError(f"task {name}: {kind} has no right answers")
    one = asked[number] if isinstance(asked, list) else asked
    prompt, answer = one.args[:2]
    return prompt, answer


@contextmanager
def opened(asked: Asked, tell: Callable[[str], None]) -> Iterator[Tasks]:
    """The tasks that are asked for, with their data. Where they are of a folder nothing is asked of a network.

    Raises InputError for a harness that is not installed, a file that is no YAML, a name that no task has, and for a
    task that the harness cannot make.
    """
    with offline(asked.folder is not None):
        manager = manager_of(asked, tell)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in asked.tasks:
            with refusing(f"task {name}", tell), seeds():
                for part, found in manager.load([name]).items():
                    loaded[part] |= found
        own = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
        yield Tasks(asked, loaded, own, tell)


def manager_of(asked: Asked, tell: Callable[[str], None]) -> Any:
    """The harness's index of tasks, which has all that are asked for. No data set is looked at."""
    asked.check()
    check_installed()
    from lm_eval.tasks import TaskManager

    if asked.folder is not None:
        check_files(asked.folder)
    with refusing("--tasks", tell):
        local = {"include_path": str(asked.folder), "include_defaults": False} if asked.folder else {}
        manager = TaskManager(**local)
    known = manager.all_tasks
    for name in asked.tasks:
        if name not in known:
            there = f"; {asked.folder} has {', '.join(known) or 'no task'}" if asked.folder else ""
            raise InputError(f"--tasks {name}: no such task{nearest_name(name, known)}{there}")
    return manager


def check_files(folder: Path) -> None:
    """Raise InputError for a task file that is no YAML, which the harness would pass over. Nothing of it is run."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: a task file that cannot be read: {reason}", kind="input") from error


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Nothing is asked of a hub meanwhile: not of data sets, nor of metrics."""
    if not wanted:
        yield
        return
    import datasets
    import huggingface_hub.constants as hub

    settings = [(hub, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")]
    before = [(where, name, getattr(where, name)) for where, name in settings if hasattr(where, name)]
    try:
        for where, name, _ in before:
            setattr(where, name, True)
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


@contextmanager
def seeds() -> Iterator[None]:
    """What tasks draw is drawn with the harness's seeds; afterwards the generators are as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def refusing(what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """What the harness raises becomes one line; its bars are not shown, and its warnings told."""
    warned, log = _Warnings(), logging.getLogger("lm_eval")
    log.addHandler(warned)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__}: {first_line(error)}", kind="input") from error
    finally:
        log.removeHandler(warned)
        for line in warned.lines:
            tell(f"{what}: {line}")


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if "using default" not in text:  # of what a task file leaves to the harness
            self.lines.append(text)


def book(tokenizer: Tokenizer, longest: int) -> Any:
    """A model of the harness that writes questions down, and looks answers up where it has some."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Book(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            loaded = tokenizer.get()
            self.ends = loaded.eos_token_id
            self.begins = loaded.bos_token_id if loaded.bos_token_id is not None else self.ends
            self.begin = None if self.begins is None else loaded.decode(self.begins)
            self.asked: dict[Question, None] = {}
            self.wanted: dict[Written, None] = {}
            self.answers: Mapping[Question, Answer] | None = None
            self.texts: Mapping[Written, str] = {}
            self.cut: set[Question] = set()

        @property
        def eot_token_id(self) -> Any:
            return self.ends

        @property
        def prefix_token_id(self) -> Any:
            if self.begins is None:
                raise InputError("an empty prompt needs a token that text begins or ends with: the tokenizer has none")
            return self.begins

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            begun = self.begin is not None and string.startswith(self.begin)
            special = not begun if add_special_tokens is None else add_special_tokens
            return tokenizer.ids(string, special=special)

        def encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """Ids of both, as of a question."""
            if not context:
                return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            before, behind = self._encode_pair(context, continuation)
            return before, behind

        def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[Answer]:
            return [self._answer(context, continuation) for _, context, continuation in requests]

        def _answer(self, context: Sequence[int], continuation: Sequence[int]) -> Answer:
            if not len(continuation):
                raise InputError("an answer of no token at all cannot be scored")
            question = asked_of(context, continuation, longest)
            if len(question.ids) < len(context) + len(continuation):
                self.cut.add(question)
            if self.answers is None:
                self.asked[question] = None
                return 0.0, False
            return self._there(self.answers, question)

        def _there(self, found: Mapping[Any, Any], key: Any) -> Any:
            if key not in found:
                raise InputError("--tasks: one asks other questions each time that it is asked: draw with fixed seeds")
            return found[key]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(*request.args) for request in requests]

        def _rolling(self, text: str) -> float:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=longest, context_len=1
            )
            return sum(self._answer(*utils.make_disjoint_window(window))[0] for window in windows)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            found = []
            for context, settings in (request.args for request in requests):
                key = context, json.dumps(settings, sort_keys=True)
                if self.answers is None:
                    self.wanted[key] = None
                found.append("" if self.answers is None else self._there(self.texts, key))
            return found

    return Book()


def written(model: Any, tokenizer: Any, longest: int, wanted: Sequence[Written]) -> dict[Written, str]:
    """What a model of transformers in memory writes behind each."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    with refusing("writing answers", lambda line: None):
        writer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest)
        some = [Instance("generate_until", {}, (text, json.loads(said)), n) for n, (text, said) in enumerate(wanted)]
        return dict(zip(wanted, writer.generate_until(some), strict=True))
