"""One stage of the model, run in pieces whose backwards are run one by one.

A piece is a stretch of forward with its own small autograd graph: its inputs are detached leaves, its outputs meet the
next piece's leaves by value only. So a pipeline may run any piece of one micro-batch between any two of another, on a
stream of its choice. The kinds, and what the graph between them carries::

    other     tokens -> embedding; final norm, head and loss; entry of an MTP module
    attn      x -> x', u, weights, balance             norm, MLA, residual, norm, router
    dispatch  u, weights -> rows, gates                tokens travel
    mlp       rows, gates, u, x' -> rows', base        routed and shared experts, or the dense feed-forward
    combine   rows', base -> x                         rows travel back

`Stage.forward` and `Stage.backward` are generators: each yields the kind of the piece that it will run next and runs it
when resumed. Backward visits the pieces in reverse. With recompute "full" a block is one piece, of kind "other", since
it travels again while it recomputes.

Sums of gradients where branches meet are made in the order in which one autograd graph would make them (shared experts,
then dispatch, then router), so a stage equals the plain model bit for bit.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepv3.data.loader import Batch
from deepv3.model.block import Block
from deepv3.model.mla import Layout
from deepv3.model.moe import MoE
from deepv3.model.router import Routing, statistics
from deepv3.model.transformer import Transformer, moe_layers, moe_row
from deepv3.pipeline.figures import StepOut
from deepv3.pipeline.layout import StageSpec
from deepv3.precision.saved import Operand, used_here
from deepv3.precision.wgrad import WeightGradQueue

OTHER, ATTN, DISPATCH, MLP, COMBINE = "other", "attn", "dispatch", "mlp", "combine"
Pieces = Generator[str, None, None]


class Scales(NamedTuple):
    """Factors of the objective: 1 / tokens of the global batch, and lambda (V3 Eq. 24-25)."""

    loss: float
    mtp: float


class Cut:
    """The graph of a piece that has run forward: its leaves, and where its outputs' gradients enter."""

    def __init__(self, leaves: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> None:
        self.leaves = leaves
        self.edges: tuple[GradientEdge, ...] = tuple(get_gradient_edge(out) for out in outputs)

    def backward(self, *gradients: Tensor | None) -> list[Any]:
        """Gradients of the leaves; weight gradients go where `wgrad.deliver` sends them. The graph is gone afterwards.

        gradients: of the outputs; None for one that nothing used.
        """
        used = [(edge, gradient) for edge, gradient in zip(self.edges, gradients, strict=True) if gradient is not None]
        edges, known = zip(*used)
        used_here(*known)
        torch.autograd.backward(edges, known)
        found = [None if leaf is None else leaf.grad for leaf in self.leaves]
        self.leaves = self.edges = ()
        return found


def _leaf(tensor: Tensor) -> Tensor:
    used_here(tensor)
    return tensor.detach().requires_grad_(torch.is_grad_enabled())


class Tape:
    """What one micro-batch leaves on a stage between its forward and its backward, and its figures.

    x, then y: input and output [T, D]; y is handed on and not kept here. losses: main and MTP, 0-dim, unscaled sums.
    balances: balance losses of the MoE layers, [B] each.
    """

    def __init__(self, batch: Batch, scales: Scales, layout: Layout, x: Tensor | None) -> None:
        self.batch, self.scales, self.layout, self.x = batch, scales, layout, x
        self.cuts: list[tuple[Cut, ...]] = []
        self.routings: list[Routing] = []
        self.balances: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.dx: Tensor | None = None

    def take(self) -> Tensor:
        """The stage's output, once."""
        assert self.x is not None, "the forward of this micro-batch has no output to hand on"
        y, self.x = self.x, None
        return y


class Stage:
    """Forward and backward of `spec`'s part of a rank's model. queue: where this part's weight gradients wait."""

    def __init__(self, model: Transformer, spec: StageSpec, queue: WeightGradQueue, device: torch.device) -> None:
        self.model, self.spec, self.queue, self.device = model, spec, queue, device
        self.cfg = model.cfg
        depths = range(self.cfg.num_hidden_layers, self.cfg.num_hidden_layers + spec.mtp)
        blocks = [(i, model.block(i)) for i in spec.layers] + [(i, m.block) for i, m in zip(depths, model.depths())]
        self.rows = [moe_row(self.cfg, index) for index, block in blocks if isinstance(block.mlp, MoE)]

    def begin(self, batch: Batch, scales: Scales, x: Tensor | None) -> Tape:
        """A tape for one micro-batch; x: [T, D] from the stage before, None on the first."""
        tokens = batch.tokens.to(self.device, non_blocking=True)
        documents = None if batch.documents is None else batch.documents.to(self.device, non_blocking=True)
        layout = self.model.layout(tokens.shape[0], self.seq_len(batch), self.device, documents)
        return Tape(Batch(tokens, documents), scales, layout, x)

    def seq_len(self, batch: Batch) -> int:
        """Trained positions per sequence: rows hold one more token, and one for each prediction depth."""
        return batch.tokens.shape[1] - 1 - self.cfg.num_nextn_predict_layers

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, tape: Tape) -> Pieces:
        """Run the stage; afterwards `tape.take()` is its output (nothing after the head)."""
        seq_len, tokens, model = tape.layout.seq_len, tape.batch.tokens, self.model
        if self.spec.embedding:
            yield OTHER
            x = model.embed_tokens(tokens[:, :seq_len])
            tape.cuts.append((Cut((), (x,)),) if x.requires_grad else ())
            tape.x = x.detach()
        for index in self.spec.layers:
            yield from self._block(model.block(index), tape)
        if not self.spec.head:
            return
        yield OTHER
        self._loss(tape, model.norm, tokens[:, 1 : seq_len + 1], tape.scales.loss)
        for k, module in enumerate(model.depths()[: self.spec.mtp], 1):
            yield OTHER
            hidden = _leaf(tape.take())
            x = module.join(model.embed_tokens(tokens[:, k : k + seq_len]), hidden)
            self._keep(tape, Cut((hidden,), (x,)) if x.requires_grad else None)
            tape.x = x.detach()
            yield from self._block(module.block, tape)
            yield OTHER
            scale = tape.scales.loss * tape.scales.mtp / self.spec.mtp
            self._loss(tape, module.norm, tokens[:, k + 1 : k + 1 + seq_len], scale)
        tape.x = None

    def _note(self, tape: Tape, routing: Routing) -> None:
        routing = routing._replace(weights=routing.weights.detach(), balance=routing.balance.detach())
        tape.routings.append(routing)
        tape.balances.append(routing.balance)

    def _keep(self, tape: Tape, *cuts: Cut | None) -> None:
        tape.cuts.append(tuple(cut for cut in cuts if cut is not None))

    def _loss(self, tape: Tape, norm, labels: Tensor, scale: float) -> None:
        x = _leaf(tape.take())
        hidden = norm(x)
        term, total = self.model.lm_head.loss(hidden, labels, scale)
        self._keep(tape, Cut((x,), (term, hidden)) if term.requires_grad else None)
        tape.losses.append(total.detach())
        tape.x = hidden.detach()

    def _block(self, block: Block, tape: Tape) -> Pieces:
        grad = torch.is_grad_enabled()
        if block.full and grad:
            yield OTHER
            x = _leaf(tape.take())
            y, routing = block(x, tape.layout)
            tape.cuts.append((Cut((x,), (y,) if routing is None else (y, routing.balance)),))
            if routing is not None:
                self._note(tape, routing)
            tape.x = y.detach()
            return
        yield ATTN
        x = _leaf(tape.take())
        x1, u, routing = block.attention(x, tape.layout)
        outputs = (x1, u.value) if routing is None else (x1, u.value, routing.weights, routing.balance)
        attn = Cut((x,), outputs) if grad else None
        if routing is None:
            yield MLP
            u_m, x_m = _leaf(u.value), _leaf(x1)
            y = block.shared(u._replace(value=u_m), x_m)
            self._keep(tape, attn, Cut((u_m, x_m), (y,)) if grad else None)
            tape.x = y.detach()
            return
        yield from self._experts(block, tape, u, x1, routing, attn)

    def _experts(self, block: Block, tape: Tape, u: Operand, x1: Tensor, routing: Routing, attn: Cut | None) -> Pieces:
        grad = torch.is_grad_enabled()
        self._note(tape, routing)
        yield DISPATCH
        used_here(routing, u)
        u_d, w_d = _leaf(u.value), _leaf(routing.weights)
        dispatched = block.dispatch(u._replace(value=u_d), routing._replace(weights=w_d))
        assert dispatched is not None
        dispatch = Cut((u_d, w_d), (dispatched.rows.value, dispatched.gates)) if grad else None
        yield MLP
        used_here(dispatched)
        u_m, x_m, g_m = _leaf(u.value), _leaf(x1), _leaf(dispatched.gates)
        rows = dispatched.rows._replace(value=_leaf(dispatched.rows.value))
        base = block.shared(u._replace(value=u_m), x_m)
        dispatched = dispatched._replace(rows=rows, gates=g_m)
        out = block.experts(dispatched)
        assert out is not None
        mlp = Cut((rows.value, g_m, u_m, x_m), (out, base)) if grad else None
        del u, x1, u_d, u_m, x_m  # held by the graphs as far as backward needs them
        yield COMBINE
        out, base = _leaf(out), _leaf(base)
        # The rows stay with the graph of the piece before, if at all: combine needs where they go, not what they were.
        y = block.combine(out, dispatched._replace(rows=Operand(out)), base)
        self._keep(tape, attn, dispatch, mlp, Cut((out, base), (y,)) if grad else None)
        tape.x = y.detach()

    # -- backward ----------------------------------------------------------------------------------------------------

    def backward(self, tape: Tape, dy: Tensor | None) -> Pieces:
        """Run the backward; dy: [T, D], None after the head. Afterwards `tape.dx` is the input's gradient (None on the
        first stage). The tape is empty then."""
        depths = self.spec.mtp if self.spec.head else 0
        for k in reversed(range(depths)):
            dy = yield from self._loss_backward(tape, dy)
            dy = yield from self._block_backward(self.model.depths()[k].block, tape, dy)
            yield OTHER
            (cut,) = tape.cuts.pop()
            (dy,) = cut.backward(dy)
        if self.spec.head:
            dy = yield from self._loss_backward(tape, dy)
        for index in reversed(self.spec.layers):
            assert dy is not None
            dy = yield from self._block_backward(self.model.block(index), tape, dy)
        if self.spec.embedding:
            yield OTHER
            (cut,) = tape.cuts.pop()
            cut.backward(dy)
            dy = None
        assert not tape.cuts, "a piece has no backward"
        tape.dx = dy

    def _loss_backward(self, tape: Tape, dhidden: Tensor | None) -> Generator[str, None, Tensor]:
        yield OTHER
        (cut,) = tape.cuts.pop()
        one = torch.ones((), dtype=tape.losses[0].dtype, device=self.device)
        (dx,) = cut.backward(one, dhidden)
        return dx

    def _block_backward(self, block: Block, tape: Tape, dy: Tensor) -> Generator[str, None, Tensor]:
        balance: list[Tensor] = []
        if isinstance(block.mlp, MoE):
            factor = tape.scales.loss * tape.layout.seq_len * self.cfg.aux_loss_alpha
            balance = [torch.full_like(tape.balances.pop(), factor)]
        cuts = tape.cuts.pop()
        if block.full:
            yield OTHER
            return cuts[0].backward(dy, *balance)[0]
        if not balance:
            attn, mlp = cuts
            yield MLP
            du, dx1 = mlp.backward(dy)
            yield ATTN
            return attn.backward(dx1, du)[0]
        attn, dispatch, mlp, combine = cuts
        del cuts
        yield COMBINE
        drows, dbase = combine.backward(dy)
        del dy
        yield MLP
        drows, dgates, du, dx1 = mlp.backward(drows, dbase)
        yield DISPATCH
        du_d, dweights = dispatch.backward(drows, dgates)
        yield ATTN
        du = du_d if du is None else du + du_d
        return attn.backward(dx1, du, dweights, *balance)[0]

    # -- figures -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def figures(self, tape: Tape) -> StepOut:
        """Losses and router statistics of a micro-batch whose forward is done; its routing is let go."""
        total = moe_layers(self.cfg)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        main, mtp = zero, zero
        if tape.losses:
            main, *depths = (loss.double() * tape.scales.loss for loss in tape.losses)
            mtp = torch.stack(depths).mean() if depths else zero
        counts, entropy, fanout = statistics(tape.routings, self.cfg, self.device)
        tape.routings = []
        balance = zero
        if tape.balances:
            factor = tape.scales.loss * tape.layout.seq_len * self.cfg.aux_loss_alpha
            balance = torch.stack(tape.balances).sum().double() * factor
        spread = [zero.new_zeros(total, *rows.shape[1:]) for rows in (counts, entropy, fanout)]
        for whole, rows in zip(spread, (counts, entropy, fanout)):
            whole[self.rows] = rows.double()
        return StepOut(main, mtp, balance, *spread)
