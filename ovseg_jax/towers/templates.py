"""Prompts of class names from a config: a template, a list of them (a prompt ensemble), or a learned prompt's file."""

from collections.abc import Sequence
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.reading import read_json, short
from ovseg_jax.towers.prompt_file import Prompt, is_prompt_file, load_prompt
from ovseg_jax.vocab.templates import PLACE, TEMPLATES


def read_templates(prompt: Any) -> tuple[str, ...] | Prompt:
    """Returns the templates that a config describes, or the learned prompt of a file.

    Args:
      prompt: a template, such as "a photo of a {}."; a list of templates; a key of `TEMPLATES`; the path of a JSON file
        with a list of templates; or the path of a learned prompt, see `towers.prompt_file`.

    Raises:
      UserError: it is none of these, or a template has no `{}`.
    """
    if is_prompt_file(prompt):
        return load_prompt(prompt)
    templates: Any = prompt
    if isinstance(prompt, str):
        if prompt in TEMPLATES:
            return TEMPLATES[prompt]
        templates = read_json(prompt, "the templates") if prompt.lower().endswith(".json") else (prompt,)
    if not isinstance(templates, Sequence) or isinstance(templates, str) or not templates:
        raise UserError(f"the prompt {prompt!r} is not a list of templates")
    for template in templates:
        if not isinstance(template, str) or PLACE not in template:
            where = f"{prompt}: " if isinstance(prompt, str) and template != prompt else ""
            raise UserError(
                f"{where}the template {short(template)} has no {PLACE} for the class name, as in "
                f"'a photo of a {PLACE}.'; built-in lists are {', '.join(TEMPLATES)}"
            )
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """Inserts a class name into a template; `_` in the name becomes a space, as in CoOp."""
    return template.replace(PLACE, name.replace("_", " "))
