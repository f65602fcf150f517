"""All wrong inputs, by group, in the order of docs/bad_input.md."""

from tests.bad_input.case import Case
from tests.bad_input.number_cases import NUMBERS
from tests.bad_input.yaml_cases import YAML

GROUPS: dict[str, dict[str, Case]] = {
    "YAML and overrides": YAML,
    "numbers": NUMBERS,
}
