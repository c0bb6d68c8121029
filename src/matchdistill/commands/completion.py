"""The command completion."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

SHELLS = ("bash", "zsh")
ACTIONS = "list show copy"  # of the command recipes
SCRIPT = """\
_matchdistill() {
  local word="${COMP_WORDS[COMP_CWORD]}" words="" found
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="@COMMANDS@"
  else
    case "${COMP_WORDS[1]}:$COMP_CWORD:$word" in
@CASES@
    esac
  fi
  while IFS= read -r found; do COMPREPLY+=("$found"); done < <(compgen -W "$words" -- "$word")
}
complete -o default -o bashdefault -F _matchdistill matchdistill
"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def print_completion(arguments: Sequence[str], commands: Mapping[str, Callable[[Sequence[str]], None]]) -> None:
    """Print the script for the shell that the arguments name.

    Args:
        arguments: of the command.
        commands: all commands by name.

    Raises:
        ValueError: they name no shell that is known.
    """
    usage = (
        f"usage: matchdistill completion {'|'.join(SHELLS)}\n\n"
        "Write it to a file once: matchdistill completion bash > ~/.matchdistill-completion\n"
        "Then have ~/.bashrc or ~/.zshrc read that: source ~/.matchdistill-completion"
    )
    match list(arguments):
        case ["-h" | "--help", *_]:
            print(usage)
        case [shell] if shell in SHELLS:
            print((ZSH if shell == "zsh" else "") + script(commands), end="")
        case _:
            raise ValueError(usage.partition("\n")[0])


def script(commands: Mapping[str, Callable[[Sequence[str]], None]]) -> str:
    """The script for commands by name, with the options that their help lists."""
    from matchdistill.recipes import packaged

    cases = []
    for name, command in commands.items():
        if options := options_of(command):
            cases.append(f'      {name}:*:-*) words="{" ".join(options)}" ;;')
        if "--print_config" in options and name != "quickstart":
            cases.append(f'      {name}:2:*) words="{" ".join(packaged())}" ;;')
    cases.append(f'      recipes:2:*) words="{ACTIONS}" ;;')
    cases.append(f'      recipes:3:*) words="{" ".join(packaged())}" ;;')
    cases.append(f'      completion:2:*) words="{" ".join(SHELLS)}" ;;')
    return SCRIPT.replace("@COMMANDS@", " ".join(commands)).replace("@CASES@", "\n".join(cases))


def options_of(command: Callable[[Sequence[str]], None]) -> list[str]:
    """The options of a command, from its whole help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command(["--help", "all"])
    return re.findall(r"^  (?:-\w, )?(--[\w.]+)", printed.getvalue(), re.MULTILINE)
