"""Methods that learn a prompt: its length, packed rows, models and tasks that it has no meaning for, and merges."""

from tests.bad_input.case import Case, bad
from tests.bad_input.head_cases import HEAD, PAIR
from tests.bad_input.vision_cases import pictures

IMAGES = "data={format: images, source: pictures, validation: 2}"
PROMPTS: dict[str, Case] = {
    "prompt tuning": bad("", "adapter.method=prompt_tuning"),
    "prefix tuning of a head": bad("", *HEAD, "adapter.method=prefix_tuning", change=PAIR),
    "a prompt on packed rows": bad(
        "adapter.method p_tuning_v2 puts its prompt before every sample, which is computed in a row of its own",
        "adapter.method=p_tuning_v2",
        "data.packing=true",
    ),
    "a prompt that fills the context": bad(
        "A prompt of 500 tokens (adapter.peft.num_virtual_tokens) and samples of 64 (data.max_tokens) are longer than "
        "the model's context of 512 tokens. Set data.max_tokens=12 or less",
        "adapter={method: prompt_tuning, peft: {num_virtual_tokens: 500}}",
    ),
    "a prompt longer than the context": bad(
        "the model's context of 512 tokens. Set a shorter prompt.",
        "adapter={method: prefix_tuning, peft: {num_virtual_tokens: 600}}",
    ),
    "a prompt of no token": bad(
        "adapter.peft.num_virtual_tokens is 0; a prompt has 1 token or more.",
        "adapter={method: p_tuning, peft: {num_virtual_tokens: 0}}",
    ),
    "a prompt's length in words": bad(
        "adapter.peft.num_virtual_tokens: got 'ten' (str); PromptTuningConfig takes int.",
        "adapter={method: prompt_tuning, peft: {num_virtual_tokens: ten}}",
    ),
    "a prompt that starts in another way": bad(
        "adapter.peft.prompt_tuning_init 'text' is unknown. Did you mean 'TEXT'? There is: RANDOM, SAMPLE_VOCAB, TEXT.",
        "adapter={method: prompt_tuning, peft: {prompt_tuning_init: text}}",
    ),
    "a prompt of a text without a tokenizer": bad(
        "adapter.method prompt_tuning: ",
        "adapter={method: prompt_tuning, peft: {prompt_tuning_init: TEXT, prompt_tuning_init_text: a, "
        "tokenizer_name_or_path: ./absent}}",
    ),
    "a prompt of another width": bad(
        "adapter.peft.token_dim follows from the model: take it away.",
        "adapter={method: p_tuning, peft: {token_dim: 32}}",
    ),
    "P-tuning v2 with a projection": bad(
        "gives them by an MLP: that is adapter.method=prefix_tuning.",
        "adapter={method: p_tuning_v2, peft: {prefix_projection: true}}",
    ),
    "a prompt that is to be merged": bad(
        "merge.after_training: An adapter of method prompt_tuning cannot be merged: its prompt stands before every",
        "adapter.method=prompt_tuning",
        "merge.after_training=true",
    ),
    "a prompt of text for images": bad(
        "adapter.method prompt_tuning trains language models and language models with a head (task: classification, "
        "regression), and this recipe has one of the image classifiers.",
        IMAGES,
        "adapter={method: prompt_tuning}",
        change=pictures("cat", "dog"),
    ),
    "visual prompts for a text": bad(
        "adapter.method vpt trains image classifiers, and this recipe has one of the language models.",
        "adapter.method=vpt",
    ),
}
