"""Rule 1: ``from``. Wrong names are refused with a list of the valid ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cryodask.products import Product
from cryodask.run.graph.chain import Chain, Draft, Step, WrongStep, listed, near, one, several, shown, who_gives, written
from cryodask.stage import Port, Stage

_SOURCE = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)(?:\.([^@]*))?(?:@(.*))?", re.DOTALL)
_KEY = re.compile(r"[A-Za-z0-9]{2,64}")

Found = dict[str, list[tuple[Product, str]]]
"""Port -> (product, key of the generation or "")."""


def check_form(label: str, stage: Stage, wanted: Any) -> None:
    """Refuse a ``from`` that is wrong in any pipeline: of the wrong form, or for an input that the stage does not have."""
    if wanted is None or isinstance(wanted, str):
        return
    ports = [p.name for p in stage.ports]
    if isinstance(wanted, (list, tuple)):
        lists = [p.name for p in stage.ports if p.many]
        one_step = wanted[0] if len(wanted) == 1 and isinstance(wanted[0], str) else "STEP"
        several = f" or from: {{{lists[0]}: {written(wanted)}}}" if lists else ""
        raise WrongStep(f"{label}: from is a list; write from: {one_step}{several}.")
    if not isinstance(wanted, Mapping):
        raise WrongStep(f"{label}: from is {shown(wanted)}; write from: STEP or from: {{input: STEP}}.")
    for name in wanted:
        if name not in ports:
            takes = listed(ports) if ports else "no inputs"
            raise WrongStep(f"{label}: {stage.name} has no input {shown(name)}.{near(name, ports)} It takes {takes}.")


def read_from(chain: Chain, draft: Draft, wanted: Any, later: Collection[str]) -> Found:
    """Sources named by ``from``. ``later``: labels of the steps below."""
    check_form(draft.label, draft.stage, wanted)
    if wanted is None:
        return {}
    if isinstance(wanted, str):
        return _fill_what_it_can(chain, draft, wanted, later)
    return {name: _fill_port(chain, draft, _port(draft, name), value, later) for name, value in wanted.items()}


def _port(draft: Draft, name: str) -> Port:
    return next(p for p in draft.stage.ports if p.name == name)


def _fill_what_it_can(chain: Chain, draft: Draft, text: str, later: Collection[str]) -> Found:
    """``from: STEP``: fills every port that the step can fill, except those filled by name only."""
    giver, output, _ = _named_step(chain, draft, "from", text, later)
    found: Found = {}
    only_by_name: list[Port] = []
    for port in draft.stage.ports:
        given = [p for p in giver.given(port.type) if output in ("", p.output)]
        if given and port.default == "explicit":
            only_by_name.append(port)
        elif given:
            found[port.name] = [_find(chain, draft, port, text, later)]
    if found:
        return found
    if only_by_name:
        names = ", ".join(f"{p.name}: {f'[{text}, ...]' if p.many else text}" for p in only_by_name[:1])
        raise WrongStep(f"{draft.label}: input {only_by_name[0].name} has no default and is filled by name only. Write from: {{{names}}}.")
    if output and not any(p.output == output for p in giver.outputs.values()):
        raise WrongStep(f"{draft.label}: from: {_no_such_output(giver, output, None)}")
    gives = listed(sorted({t for _, t in giver.outputs})) if giver.outputs else "nothing"
    takes = listed(p.name for p in draft.stage.ports) if draft.stage.ports else "no inputs"
    raise WrongStep(f"{draft.label}: from: {text} gives {gives}, but {draft.stage.name} takes {takes}.")


def _fill_port(chain: Chain, draft: Draft, port: Port, value: Any, later: Collection[str]) -> list[tuple[Product, str]]:
    """``from: {port: STEP}``, or a list for a port that takes one."""
    where = f"{draft.label}: from.{port.name}"
    sources = list(value) if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) and not port.many:
        if port.type == "particles" and len(sources) > 1:
            raise WrongStep(
                f"{where}: {len(sources)} sources are given; {draft.stage.name} takes one set. Merge them first:  "
                f"- merge: {{from: {{particles: {written(value)}}}}}"
            )
        if len(sources) == 1 and isinstance(sources[0], str):
            raise WrongStep(f"{where} is a list; write from: {{{port.name}: {sources[0]}}}.")
        raise WrongStep(f"{where}: {len(sources)} sources are given; {draft.stage.name} takes one.")
    if not sources:
        raise WrongStep(f"{where} is an empty list. Write from: {{{port.name}: [STEP, STEP]}}.")
    found = [_find(chain, draft, port, text, later) for text in sources]
    refuse_twice(where, [f"{product.ref}@{key}" if key else product.ref for product, key in found])
    return found


def refuse_twice(where: str, names: Sequence[str]) -> None:
    """Refuse a list that names one source twice; the current and an earlier result of a step are two sources."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise WrongStep(f"{where} names one source twice: {twice}.")


def _named_step(chain: Chain, draft: Draft, where: str, text: Any, later: Collection[str]) -> tuple[Step, str, str]:
    """(step, output or "", key or "") of ``STEP``, ``STEP.OUTPUT`` or ``STEP@KEY``."""
    place = f"{draft.label}: {where}"
    match = _SOURCE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise WrongStep(f"{place}: {shown(text)} is not the name of a step.{near(text, chain.by_label)}")
    label, output, key = match[1], match[2], match[3]
    if label not in chain.by_label:
        if label == draft.label:
            raise WrongStep(f"{place}: a step cannot take its own result.")
        if label in later:
            raise WrongStep(f"{place}: {label!r} comes after this step. Move it up, or name an earlier step.")
        if f"{label}.{output}" in chain.stages:
            raise WrongStep(f"{place}: no step is called {label!r}. The step of {label}.{output} is called {output!r}.")
        raise WrongStep(f"{place}: no step is called {label!r}.{near(label, chain.by_label)}")
    if key is not None and not _KEY.fullmatch(key):
        raise WrongStep(f"{place}: {shown(key)} is not the key of a result. Write {label}@KEY, letters and digits only.")
    if output == "":
        raise WrongStep(f"{place}: no output name follows the dot of {shown(text)}.")
    return chain.by_label[label], output or "", key or ""


def _find(chain: Chain, draft: Draft, port: Port, text: Any, later: Collection[str]) -> tuple[Product, str]:
    """The product that a source names for a port, and the pinned key."""
    where = f"from.{port.name}"
    giver, output, key = _named_step(chain, draft, where, text, later)
    same = giver.given(port.type)
    found = giver.outputs.get((output or port.type, port.type))
    if found is None and not output and len(same) == 1:
        found = same[0]
    if found is not None:
        return found, key
    place = f"{draft.label}: {where}"
    if output and not (same == [] and any(p.output == output for p in giver.outputs.values())):
        raise WrongStep(f"{place}: {_no_such_output(giver, output, port.type)}")
    if same:
        raise WrongStep(
            f"{place}: {giver.label} gives several {several(port.type)}: {listed(p.ref for p in same)}. "
            f"Choose one: from: {{{port.name}: {same[0].ref}}}."
        )
    gives = listed(sorted({t for _, t in giver.outputs})) if giver.outputs else "nothing"
    raise WrongStep(f"{place}: {giver.label} gives {gives}, not {one(port.type)}.{who_gives(chain, draft, port.type)}")


def _no_such_output(giver: Step, output: str, type_: str | None) -> str:
    """``classify3d gives no particles called 'class4'. It gives ...``."""
    given = [p for (_, t), p in giver.outputs.items() if type_ in (None, t)]
    kind = several(type_) if type_ else "output"
    if not given:
        gives = listed(sorted({t for _, t in giver.outputs})) if giver.outputs else "nothing"
        return f"{giver.label} gives no {kind} called {output!r}; it gives {gives}."
    refs = listed(dict.fromkeys(p.ref for p in given))
    names = dict.fromkeys(p.output for p in given if p.output != p.type)
    return f"{giver.label} gives no {kind} called {output!r}. It gives {refs}.{near(output, names)}"
