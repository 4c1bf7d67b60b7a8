"""Argument parser of all entry points."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm.exceptions import StartupError, VLLMValidationError

# Short names, understood by the parsers that have the flag.
_SHORT = {
    "-cc": "--compilation-config",
    "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpa": "--data-parallel-address",
    "-dpb": "--data-parallel-backend",
    "-dpl": "--data-parallel-size-local",
    "-dpn": "--data-parallel-rank",
    "-dpp": "--data-parallel-rpc-port",
    "-dpr": "--data-parallel-start-rank",
    "-ep": "--enable-expert-parallel",
    "-n": "--nnodes",
    "-pcp": "--prefill-context-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-r": "--node-rank",
    "-tp": "--tensor-parallel-size",
}
_LEVEL = re.compile(r"-O(\d)")


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes `--a_b` for `--a-b`, the short names of `_SHORT`, no abbreviations, and says what is wrong in one line.

    `--flag.key VALUE` sets one key of a flag that takes a JSON object. `--help=WORD` shows one group, or the flags
    whose name holds the word; `--help=listgroup` names the groups. A parser with a flag `--config` reads flags from
    that YAML file; those of the command line win.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    # argparse declares three overloads, of which only the plain one is used here.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parses; exits with status 1 and one line when an action refuses its value with `StartupError`."""
        argv = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_args([_normalised(arg) for arg in argv], namespace)
        except (StartupError, VLLMValidationError) as exc:
            self.exit(1, f"error: {exc}\n")

    # Called for the parser of a subcommand too, unlike parse_args.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        argv = [self._long_name(arg) for arg in (sys.argv[1:] if args is None else args)]
        topic = next((arg.partition("=")[2] for arg in argv if arg.startswith("--help=")), None)
        if topic is not None and not any(isinstance(a, argparse._SubParsersAction) for a in self._actions):
            print(self._help_on(topic), end="")
            self.exit(0)
        if "--config" in self._option_string_actions:
            argv = self._with_config(argv)
        return super().parse_known_args(self._join_keys(argv), namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def _long_name(self, arg: str) -> str:
        # `-cc.key value` and `-tp=2` have the name at their start.
        short = re.match(r"-\w+", arg)
        name = _SHORT.get(short[0]) if short else None
        known = self._option_string_actions
        if (
            short is None
            or name is None
            or name not in known
            or short[0] in known
            or arg[short.end() :][:1] not in "=."
        ):
            return arg
        return name + arg[short.end() :]

    def _help_on(self, topic: str) -> str:
        titled = [group for group in self._action_groups if group.title]
        word = topic.lower().replace("_", "-").lstrip("-")
        if word == "all":
            return self.format_help()
        if word == "listgroup":
            return "".join(f"{group.title}\n" for group in titled)
        formatter = self._get_formatter()
        groups = [group for group in titled if (group.title or "").lower().replace(" ", "-") == word.replace(" ", "-")]
        for group in groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        if not groups:
            found = [a for a in self._actions if any(word in name for name in a.option_strings)]
            shown = [a for a in found if a.help is not argparse.SUPPRESS]
            if not shown:
                self.error(f"--help={topic}: no group and no flag is called so; --help=listgroup names the groups")
            formatter.start_section(f"flags with {topic!r}")
            formatter.add_arguments(shown)
            formatter.end_section()
        return formatter.format_help()

    def _join_keys(self, argv: list[str]) -> list[str]:
        """Turns `--flag.key VALUE` into `--flag={"key": VALUE}`, all keys of a flag together."""
        joined: list[str] = []
        objects: dict[str, dict[str, Any]] = {}
        rest = iter(argv)
        for arg in rest:
            name, equals, value = arg.partition("=")
            flag, dot, path = name.partition(".")
            if not dot or flag not in self._option_string_actions:
                joined.append(arg)
                continue
            if not equals:
                value = next(rest, "")
            *parents, key = path.split(".")
            target = objects.setdefault(flag, {})
            for parent in parents:
                target = target.setdefault(parent, {})
            target[key] = _json_or_text(value)
        return joined + [f"{flag}={json.dumps(value)}" for flag, value in objects.items()]

    def _with_config(self, argv: list[str]) -> list[str]:
        """The arguments with those of the `--config` file ahead of all other flags."""
        paths: list[str] = []
        rest: list[str] = []
        args = iter(argv)
        for arg in args:
            name, equals, value = arg.partition("=")
            if name != "--config":
                rest.append(arg)
            elif equals:
                paths.append(value)
            else:
                paths.append(next(args, ""))
        if not paths:
            return argv
        if len(paths) > 1:
            raise StartupError(f"--config was given {len(paths)} times; give one file.")
        given = {self._option_string_actions.get(re.split("[=.]", arg)[0]) for arg in rest if arg.startswith("-")}
        first_flag = next((i for i, arg in enumerate(rest) if arg.startswith("-")), len(rest))
        from_file: list[str] = []
        for key, value in _read_yaml(paths[0]).items():
            flag = "--" + str(key).replace("_", "-")
            action = self._option_string_actions.get(flag)
            if action is None:
                raise StartupError(f"--config {paths[0]}: there is no flag {flag}.")
            # `vllm serve MODEL` names the model without a flag.
            if action not in given and not (flag == "--model" and first_flag > 0):
                from_file += self._as_arguments(paths[0], flag, action, value)
        return rest[:first_flag] + from_file + rest[first_flag:]

    def _as_arguments(self, path: str, flag: str, action: argparse.Action, value: Any) -> list[str]:
        if value is None:
            return []
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise StartupError(f"--config {path}: {flag} must be true or false, got {value!r}.")
            off = f"--no-{flag[2:]}"
            return [flag] if value else [off] if off in self._option_string_actions else []
        if isinstance(value, list) and action.nargs in ("+", "*"):
            return [flag, *map(str, value)]
        if isinstance(value, dict | list):
            return [f"{flag}={json.dumps(value)}"]
        return [f"{flag}={str(value).lower() if isinstance(value, bool) else value}"]


def _normalised(arg: str) -> str:
    level = _LEVEL.fullmatch(arg)
    if level:
        return f"--optimization-level={level[1]}"
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    flag, dot, key = name.partition(".")
    return flag.replace("_", "-") + dot + key + equals + value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_yaml(path: str) -> dict[Any, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as exc:
        raise StartupError(f"--config {path} cannot be read: {exc}.") from None
    except yaml.YAMLError as exc:
        raise StartupError(f"--config {path} is not YAML: {' '.join(str(exc).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"--config {path} must hold flags as `name: value` lines, got a {type(content).__name__}.")
    return content
