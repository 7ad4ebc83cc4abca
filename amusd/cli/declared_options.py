"""Commands whose options come from declared settings, and their place in the typer app.

They are commands of click, the library below typer, because typer reads options from the signature
of a function only.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import typer
from click.core import ParameterSource
from click.shell_completion import ShellComplete
from click.types import OptionHelpExtra
from typer.core import TyperCommand

from amusd.cli.usage_errors import BAD_USAGE, one_line
from amusd.protocol.errors import InvalidInputError
from amusd.settings import S, Setting, settings_in, with_values

HELP_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
"""How every command is asked for its help."""


class _ValueType(click.ParamType[Any]):
    """Reads the text of a setting."""

    name = "value"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value that a text stands for; a default is returned as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._setting.read(value)
        except InvalidInputError as error:
            self.fail(str(error), param, ctx)


class _SwitchType(_ValueType, click.types.BoolParamType):
    """The same for a switch: click makes pairs of flags only for its own type of switches."""


class SettingOption(click.Option):
    """The flag, environment variable and help text of a setting."""

    def __init__(self, setting: Setting) -> None:
        """Make the option of ``setting``."""
        is_switch = setting.kind is bool
        flags = "/".join(filter(None, (setting.flag, setting.off_flag)))
        super().__init__(
            [setting.name, flags],
            type=_SwitchType(setting) if is_switch else _ValueType(setting),
            is_flag=is_switch,
            default=setting.default,
            multiple=setting.declaration.is_repeated,
            envvar=setting.variable or None,
            metavar=None if is_switch else _metavar(setting),
            help=setting.declaration.help,
        )
        self.setting = setting

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Return what stands in brackets behind the help text."""
        extra = OptionHelpExtra()
        if self.setting.variable:
            extra["envvars"] = (self.setting.variable,)
        if self.setting.default_text:
            extra["default"] = self.setting.default_text
        if self.setting.declaration.value_range:
            extra["range"] = self.setting.declaration.value_range
        return extra


def _metavar(setting: Setting) -> str:
    """Return what stands for the value in the help text."""
    if setting.choices:
        return f"[{'|'.join(setting.choices)}]"
    return (setting.unit or setting.name.rpartition("_")[2]).upper()


def settings_command(
    name: str,
    help_text: str,
    defaults: S,
    run: Callable[..., None],
    arguments: Sequence[click.Argument] = (),
) -> click.Command:
    """Return a command that changes ``defaults`` by its options.

    It calls ``run`` with the result, and then the values of ``arguments``.
    """

    def callback(**values: Any) -> None:
        given = [values.pop(one.name) for one in arguments if one.name is not None]
        run(with_values(defaults, values), *given)

    options: list[click.Parameter] = [SettingOption(one) for one in settings_in(defaults)]
    return click.Command(
        name,
        params=[*arguments, *options],
        callback=callback,
        help=help_text,
        context_settings=HELP_NAMES,
    )


def mount(app: typer.Typer, command: click.Command) -> None:
    """Make ``command`` a command of ``app``."""

    def pass_on(context: typer.Context) -> None:
        _run(command, context.command_path, context.args)

    app.command(
        command.name,
        cls=_completed_by(command),
        help=command.help,
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "allow_interspersed_args": False,
            "ignore_unknown_options": True,
        },
    )(pass_on)


def _completed_by(command: click.Command) -> type[TyperCommand]:
    """Return the class of a typer command whose words a shell completes as those of ``command``."""

    class Completed(TyperCommand):
        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            """Return what may follow the words so far; typer reads click's items as its own."""
            words = ShellComplete(command, {}, ctx.command_path, "")
            return list(words.get_completions(list(ctx.args), incomplete))

    return Completed


def _run(command: click.Command, path: str, arguments: list[str]) -> None:
    """Run ``command``; a wrong value is one line on standard error, and exit code 2."""
    try:
        with command.make_context(path, arguments) as context:
            command.invoke(context)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise typer.Exit(BAD_USAGE) from None
    except click.UsageError as error:
        print(f"error: {_explanation(error, path)}", file=sys.stderr)
        raise typer.Exit(BAD_USAGE) from None
    except click.exceptions.Exit as end:
        raise typer.Exit(end.exit_code) from None


def _explanation(error: click.UsageError, path: str) -> str:
    """Return what is wrong in one line, with the flag and the variable of a wrong value."""
    option, context = getattr(error, "param", None), error.ctx
    where = context.command_path if context is not None else path
    if context is not None and isinstance(option, SettingOption):
        message = f"{_source(option.setting, context)}: {error.message}"
    else:
        message = one_line(error.format_message())
    return f"{message}; see {where} --help"


def _source(setting: Setting, context: click.Context) -> str:
    """Return the name under which a value was given, and the other one in brackets."""
    if not setting.variable:
        return setting.flag
    source = context.get_parameter_source(setting.name)
    if source is ParameterSource.ENVIRONMENT:
        return f"{setting.variable} ({setting.flag})"
    return f"{setting.flag} ({setting.variable})"
