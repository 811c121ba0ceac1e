# %% [markdown]
# # From a text to a policy that pleases a reward model
#
# The cells between the `# %%` marks run one by one in Jupyter, VS Code, Spyder or Colab, or all at once:
# `python docs/walkthrough.py`. Put any text beside it as `input.txt`, the works of Shakespeare say. One core needs two
# minutes.

# %%
import json
import runpy
from pathlib import Path

from plaudit import SFT, VPG, Evaluate, Reward, Sample, evaluate, sample, train
from plaudit.cli import shipped
from plaudit.records import write
from plaudit.rewards import load_rewards

# %% [markdown]
# ## A language model from nothing
#
# Characters in, the next character out. The last tenth of the text is held out.

# %%
shape = "layers=3,width=96,heads=4,context=128"
language = {"max_tokens": 128, "overlap": 16, "holdout": 0.1, "eval_limit": 64}
base = train(
    SFT(
        model=f"scratch:llama:{shape}",
        data="input.txt",
        output="runs/walk/base",
        **language,
        steps=250,
        batch_size=16,
        learning_rate=3e-3,
    )
)
print("nats a character:", base.summary["nll_before"], "->", base.summary["nll_after"])

# %% [markdown]
# ## Judgements
#
# Pieces of the text, each rated by how often the letter h occurs in it: somebody has a simple taste.

# %%
make = runpy.run_path(str(shipped("token_counts.py")))["make"]
training, held_out = make(Path("input.txt").read_text("utf-8"), "h")
write("counts/train.jsonl", training)
write("counts/heldout.jsonl", held_out)
print(len(training), "pieces, such as", training[0])

# %% [markdown]
# ## A reward model that learns the taste

# %%
reward = train(
    Reward(
        model="scratch:gpt2:layers=2,width=64,context=264",
        data="counts/train.jsonl",
        eval_data="counts/heldout.jsonl",
        objective="regression",
        output="runs/walk/reward",
        steps=250,
        learning_rate=3e-3,
        schedule="cosine",
    )
)
print("correlation with the counts:", reward.summary["pearson"])
score = load_rewards(str(reward.final))
print(score([""] * 2, ["The shepherd hath his hat.", "No letter of it."], {}))

# %% [markdown]
# ## A policy that learns to please it
#
# `kl=0.0` lets it go as far as it likes, which is too far; with `kl=1.0` it goes on writing words.

# %%
starts = str(shipped("starts.jsonl"))
policy = train(
    VPG(
        model=str(base.final),
        data=starts,
        rewards=str(reward.final),
        output="runs/walk/policy",
        holdout=0.0,
        kl=0.0,
        steps=60,
        rollout=52,
        batch_size=52,
        group=4,
        max_new_tokens=20,
        learning_rate=2e-3,
    )
)
print("score:", [round(row["score"], 1) for row in policy.metrics() if "score" in row][::10])

# %% [markdown]
# ## Before and after
#
# The reward model, and the true count as an independent judge.

# %%
policies = (f"base={base.final}", f"policy={policy.final}")
judged = evaluate(
    Evaluate(
        policies=policies,
        data=starts,
        rewards=str(reward.final),
        judge="count:h",
        max_new_tokens=20,
        output="runs/walk/judged",
    )
)
print({name: judged.summary[name]["judge"] for name in ("base", "policy")}, "win rate", judged.summary["win_rate"])

# %%
said = Path("runs/walk/samples.jsonl")
said.unlink(missing_ok=True)
sample(Sample(model=str(policy.final), data=starts, max_new_tokens=20, output=str(said)))
for line in said.read_text("utf-8").splitlines()[:5]:
    print(json.loads(line))
