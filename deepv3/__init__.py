"""deepv3 pre-trains DeepSeek-V3-class mixture-of-experts transformers.

A token's way through the package::

    data/       documents -> FIM -> packed sequences -> micro-batch
    model/      embedding -> blocks (norm, MLA; norm, router, dispatch, experts, combine, shared) -> head, MTP -> loss
    pipeline/   which rank does which piece, when
    precision/  in which format each operand lives; where weight gradients go
    kernels/    how one operation runs fast (installed as deepv3.kernels)
    optim/      gradient -> norm -> AdamW -> weights, biases, EMA
    checkpoint/ state <-> disk
    export/     state -> Hugging Face
    planner/    all of it on paper: what a run needs, and where experts lie at inference
    train/      the loop, its metrics, its plots
    generate/   a trained model continues prompts: latent cache, speculation by the prediction modules
    eval/       perplexity, lm-evaluation-harness

An import arrow points to a smaller level only: errors, config, arithmetic, kernels (0); dist (1); precision (2);
data, model (3); pipeline (4); planner, optim (5); checkpoint (6); export, train, generate, eval (7); launch (8).
"""

__version__ = "0.1.0"
