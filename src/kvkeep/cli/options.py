"""One option per setting, made from the settings model itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from kvkeep.config import Settings, load


def new_app(help_text: str) -> typer.Typer:
    """Return an app in the house manner: plain errors, no completion options."""
    return typer.Typer(
        help=help_text, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=False
    )


def with_settings(
    *fields: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options for these settings (all where none is named).

    The command receives the loaded `Settings` first; only options that were typed become flags.
    """
    names = fields or tuple(Settings.model_fields)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            flags = {name: values.pop(name) for name in names}
            command(load({k: v for k, v in flags.items() if v not in (None, [])}), **values)

        parameters = [*own, *_parameters(names)]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        del wrapper.__wrapped__
        return wrapper

    return decorate


def _parameters(names: Iterable[str]) -> Iterable[inspect.Parameter]:
    for name in names:
        field = Settings.model_fields[name]
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_flag_type(field), _option(name, field)],
        )


def _flag_type(field: FieldInfo) -> Any:
    if field.annotation is bool:
        return bool | None
    return list[str] | None if _repeats(field) else str | None


def _repeats(field: FieldInfo) -> bool:
    """Tell whether an option may be given several times."""
    return get_origin(field.annotation) is tuple


def _option(name: str, field: FieldInfo) -> Any:
    flag = name.replace("_", "-")
    text = field.description or ""
    if field.annotation is bool:
        declared = f"--{flag}/--no-{flag}" if field.default else f"--{flag}"
        return typer.Option(declared, help=text, show_default=False)
    if _repeats(field):
        return typer.Option(f"--{flag}", help=f"{text}; repeatable", metavar="VALUE")
    if field.default is not None and name != "model":
        text = f"{text} (default: {field.default})"
    return typer.Option(f"--{flag}", help=text, metavar=_metavar(field), show_default=False)


def _metavar(field: FieldInfo) -> str:
    choices = getattr(field.annotation, "__args__", ())
    words = [choice for choice in choices if isinstance(choice, str)]
    return "|".join(words) if words else "VALUE"
