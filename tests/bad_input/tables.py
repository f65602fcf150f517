"""All wrong inputs, by group, in the order of docs/bad_input.md."""

from tests.bad_input.adapter_cases import ADAPTERS, DEEPSPEED, GENOMES
from tests.bad_input.answer_cases import CHATS, LABELS
from tests.bad_input.bottleneck_cases import BOTTLENECKS
from tests.bad_input.case import Case
from tests.bad_input.code_cases import CODE
from tests.bad_input.compare_cases import COMPARISONS
from tests.bad_input.data_cases import RECORDS, TABLES
from tests.bad_input.head_cases import HEADS
from tests.bad_input.launch_cases import COMMANDS, ENVIRONMENT, OUTPUT
from tests.bad_input.link_cases import LINKS
from tests.bad_input.model_cases import CONFIGS
from tests.bad_input.noah_cases import NOAH
from tests.bad_input.number_cases import NUMBERS
from tests.bad_input.peft_cases import PEFT_ARGUMENTS
from tests.bad_input.prompt_cases import PROMPTS
from tests.bad_input.report_cases import REPORTS
from tests.bad_input.run_cases import FOLDERS
from tests.bad_input.score_cases import SCORES
from tests.bad_input.smaller_cases import SMALLER
from tests.bad_input.structure_cases import STRUCTURES
from tests.bad_input.supernet_cases import SUPERNETS
from tests.bad_input.task_cases import ANSWERS, CHOICES
from tests.bad_input.tokenizer_cases import TOKENIZERS
from tests.bad_input.vision_cases import VISION
from tests.bad_input.vlora_cases import SHARING
from tests.bad_input.weight_cases import FILES
from tests.bad_input.yaml_cases import YAML

GROUPS: dict[str, dict[str, Case]] = {
    "YAML and overrides": YAML,
    "numbers": NUMBERS,
    "records": RECORDS,
    "CSV and parquet": TABLES,
    "class labels": LABELS,
    "multiple choice": CHOICES,
    "generated answers": ANSWERS,
    "few-shot, named test sets, VTAB-1K": VISION,
    "benchmarks, scores, heads": HEADS,
    "conversations": CHATS,
    "model folder, config.json": CONFIGS,
    "model folder, weights": FILES,
    "model folder, tokenizer; model section": TOKENIZERS,
    "adapter": ADAPTERS,
    "arguments of PEFT's methods": PEFT_ARGUMENTS,
    "prompts": PROMPTS,
    "bottleneck adapters, fusion": BOTTLENECKS,
    "NOAH": NOAH,
    "genome files": GENOMES,
    "lr auto, even scaling, a structure within a budget": STRUCTURES,
    "draws and start of a supernet": SUPERNETS,
    "DeepSpeed files": DEEPSPEED,
    "layers that share weights; Muon": SHARING,
    "a smaller model of a dense one; distillation": SMALLER,
    "run folder; merge, evaluate, search": FOLDERS,
    "report": REPORTS,
    "output.dir": OUTPUT,
    "links to nowhere": LINKS,
    "environment of a launch": ENVIRONMENT,
    "command line": COMMANDS,
    "files that would run code, or reach out of their folder": CODE,
    "compare": COMPARISONS,
    "benchmarks by lm-eval, the best checkpoint, trackers": SCORES,
}
