"""The command recipes."""

from __future__ import annotations

from collections.abc import Sequence

from matchdistill.files import path_of


def recipes(arguments: Sequence[str]) -> None:
    """List, show or copy the packaged recipes: list | show NAME | copy NAME [FILE]."""
    from matchdistill.messages import did_you_mean
    from matchdistill.recipes import packaged

    known = packaged()
    usage = "usage: matchdistill recipes list | show NAME | copy NAME [FILE]"
    match list(arguments):
        case [*others] if {"-h", "--help"} & set(others):
            print(f"{usage}\n\n{recipes.__doc__}\n\nA copy is yours to change: matchdistill fit FILE trains by it.")
        case ["list"]:
            width = max(map(len, known))
            for name, text in known.items():
                print(f"{name:{width}}  {text.splitlines()[0].lstrip('# ')}")
        case ["show" | "copy", name, *_] if name not in known:
            raise ValueError(f"no recipe {name!r}{did_you_mean(name, known)}: expected one of {', '.join(known)}")
        case ["show", name]:
            print(known[name], end="")
        case ["copy", name, *rest] if len(rest) < 2:
            from matchdistill.files import atomic_write

            path = path_of(rest[0] if rest else f"{name}.yaml")
            if path.exists():
                raise ValueError(f"{path} exists already: name another file")
            atomic_write(path, lambda temporary: temporary.write_text(known[name], encoding="utf-8"))
            print(path)
        case _:
            raise ValueError(usage)
