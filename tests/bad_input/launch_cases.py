"""output.dir, the environment of a launch, and the command line."""

from tests.bad_input.case import Case, bad, file

OUTPUT: dict[str, Case] = {
    "output.dir a file": bad(
        "output.dir rows.jsonl: rows.jsonl is a file, and a folder is expected", "output.dir=rows.jsonl"
    ),
    "output.dir under a file": bad(
        "output.dir rows.jsonl/x: rows.jsonl is a file, and a folder is", "output.dir=rows.jsonl/x"
    ),
    "output.dir on /proc": bad(
        "output.dir /proc/x cannot be made or written to: No such file or", "output.dir=/proc/x"
    ),
    "output.dir on /sys": bad("output.dir /sys/x cannot be made or written to: Operation not", "output.dir=/sys/x"),
    "output.dir of a name too long": bad("output.dir", "output.dir=" + "x" * 300),
    "output.dir of a path too long": bad("output.dir", "output.dir=" + "x/" * 3000),
    "output.dir with a null byte": bad(
        "output.dir: 'a\\x00b' names no folder: give the run one of its own,", 'output.dir="a\\0b"'
    ),
    "output.dir below the home folder (~)": bad("", "output.dir=~/glora_llm_no_such_folder/run"),
    "output.dir below the home folder of nobody": bad(
        "'~no_such_user/run': no user has that name", "output.dir=~no_such_user/run"
    ),
    "adapter.weights below the home folder of nobody": bad(
        "'~no_such_user/run': no user has that name", "adapter.weights=~no_such_user/run"
    ),
    "--recipe= below the home folder (~)": bad(
        "No recipe file '~/no_such_recipe.yaml'", command=("train", "--recipe=~/no_such_recipe.yaml", "--dry-run")
    ),
    "--out= of the home folder of nobody": bad(
        "'~no_such_user/merged': no user has that name", command=("merge", "run", "--out=~no_such_user/merged")
    ),
    "output.dir empty": bad("output.dir: '' names no folder: give the run one of its own, such as", "output.dir=''"),
    "output.dir blank": bad(
        "output.dir: '  ' names no folder: give the run one of its own, such as", "output.dir='  '"
    ),
    "output.dir a link to nowhere": bad(
        "output.dir run: run is a link to nowhere, and a folder is expected",
        change=lambda folder: (folder / "run").symlink_to(folder / "gone" / "x"),
    ),
}
PORT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
ENVIRONMENT: dict[str, Case] = {
    f"{' '.join(f'{name}={value}' for name, value in variables.items() if name not in hidden)}{more}": bad(
        says, environment=variables
    )
    for says, variables, hidden, more in (
        ("WORLD_SIZE is 'abc'; expected a number from 1 on", {"WORLD_SIZE": "abc"}, (), ""),
        ("WORLD_SIZE is '0'", {"WORLD_SIZE": "0"}, (), ""),
        ("WORLD_SIZE is '2.0'", {"WORLD_SIZE": "2.0"}, (), ""),
        ("WORLD_SIZE is '٢'", {"WORLD_SIZE": "٢"}, (), " (Arabic digit)"),
        ("RANK is 'abc'", {**PORT, "WORLD_SIZE": "1", "RANK": "abc"}, PORT, ""),
        ("RANK=3 of WORLD_SIZE=1 processes; ranks begin at 0", {**PORT, "WORLD_SIZE": "1", "RANK": "3"}, PORT, ""),
        ("RANK=2 of WORLD_SIZE=2 processes", {**PORT, "WORLD_SIZE": "2", "RANK": "2"}, PORT, ""),
        ("RANK is '-1'", {**PORT, "WORLD_SIZE": "1", "RANK": "-1"}, PORT, ""),
        ("RANK is set, and WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not", {"RANK": "0"}, (), " alone"),
        (
            "MASTER_PORT is 'abc'",
            {**PORT, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "abc"},
            ("LOCAL_RANK", "MASTER_ADDR"),
            "",
        ),
        (
            "MASTER_PORT is '99999'",
            {**PORT, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"},
            ("LOCAL_RANK", "MASTER_ADDR"),
            "",
        ),
        ("DS_ACCELERATOR is 'tpu'; expected cpu or cuda", {"DS_ACCELERATOR": "tpu"}, (), ""),
        ("can use none", {"DS_ACCELERATOR": "cuda"}, (), " without one"),
        ("3 processes has no whole accumulation", {"WORLD_SIZE": "3"}, (), " and a batch of 2"),
    )
}
COMMANDS: dict[str, Case] = {
    "an unknown command": Case(
        "argument COMMAND: invalid choice: 'trian' (choose from 'init', 'plan',", (), command=("trian",)
    ),
    "no recipe": Case("the following arguments are required: --recipe", (), command=("train",)),
    "an unknown option": bad("unrecognized arguments: --dryrun", "--dryrun"),
    "--gpus of text": bad("--gpus is 'two'; expected a number above 0, or all.", "--gpus", "two"),
    "--gpus 0": bad("--gpus is '0'; expected a number above 0, or all.", "--gpus", "0"),
    "--gpus 1000": bad("--gpus is 1000; without a GPU it is one process a core at most, 2 here.", "--gpus", "1000"),
    "a hostfile that is not there": bad(
        "--hostfile none cannot be read: [Errno 2] No such file or directory:", "--hostfile", "none"
    ),
    "a hostfile of another form": bad(
        "'node1 gpus=8'; expected a machine and its GPUs, as: node1 slots=8",
        "--hostfile",
        "hosts",
        change=file("hosts", "node1 gpus=8\n"),
    ),
    "an empty hostfile": bad(
        "hosts names no machine; expected a line for each, as: node1 slots=8",
        "--hostfile",
        "hosts",
        change=file("hosts", "# nobody\n"),
    ),
    "init of a file that is not there": Case(
        "There is no file none.jsonl. Did you mean 'rows.jsonl'? Set GLORA_DATA", (), command=("init", "none.jsonl")
    ),
    "init without records": Case("own.jsonl holds no rows.", (), file("own.jsonl", ""), command=("init", "own.jsonl")),
    "init of an unknown format": Case(
        "Unknown data format 'poetry'; there is: alpaca, chat, classification,",
        ("--task", "poetry"),
        command=("init", "rows.jsonl"),
    ),
    "import of nothing": Case(
        "none is not there. Read are PEFT's LoRA, HiRA, IA3 and GLoRA (a folder",
        (),
        command=("import", "none", "--out", "own"),
    ),
    "recipes of an unknown name": Case(
        "No recipe 'quikstart'; there is: bench_search, dense_1b_small,", (), command=("recipes", "quikstart")
    ),
}
