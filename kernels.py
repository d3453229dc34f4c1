"""Where PyTorch's own kernels are too slow or have to know too much. Each function has a plain form, which runs
everywhere, and for bfloat16 on a GPU Triton kernels that do the same; the tests compare the two.

The oracle's inner loop: the short steps between matrix products, and a read-out whose logits are never written to
memory. A router's forward: an FFN for tokens whose choices only the GPU knows (routed_ffn).
"""
import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # not on this platform: the plain forms serve
    triton = None


def by_kernel(x):
    return triton is not None and x.is_cuda and x.dtype == torch.bfloat16


if triton:
    @triton.jit
    def norm_kernel(x, y, weight, total, out, d: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr):
        """One program, one row: out = RMSNorm(x + y); with ADD the sum is written too."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        a = tl.load(x + row * d + i, mask=i < d, other=0.0).to(tl.float32)
        if ADD:
            a = (a + tl.load(y + row * d + i, mask=i < d, other=0.0).to(tl.float32)).to(tl.bfloat16)
            tl.store(total + row * d + i, a, mask=i < d)
            a = a.to(tl.float32)
        g = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
        tl.store(out + row * d + i, (a * tl.rsqrt(tl.sum(a * a) / d + 1e-5) * g).to(tl.bfloat16), mask=i < d)

    @triton.jit
    def swiglu_tile(h, weight, row, column, d: tl.constexpr, inner, DEPTH: tl.constexpr):
        """silu(gate) * up: rows `row` of h [.., d] by columns `column` of both halves of weight [2 inner, d]"""
        h += row[:, None].to(tl.int64) * d
        weight += tl.minimum(column, inner - 1)[:, None] * d  # columns beyond are computed and not stored
        gate = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
        up = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
        for k in range(0, d, DEPTH):
            part = k + tl.arange(0, DEPTH)[None, :]
            a = tl.load(h + part, mask=part < d, other=0.0)
            b = tl.load(weight + part, mask=part < d, other=0.0)
            c = tl.load(weight + inner * d + part, mask=part < d, other=0.0)
            gate, up = tl.dot(a, b.T, gate), tl.dot(a, c.T, up)
        return gate * tl.sigmoid(gate) * up

    @triton.jit
    def swiglu_kernel(h, weight, out, N, d: tl.constexpr, inner: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
        """One program: a tile of ROWS x COLUMNS of both products, gate and up; only silu(gate) * up is written."""
        tiles = tl.cdiv(inner, COLUMNS)
        row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
        column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        value = swiglu_tile(h, weight, tl.minimum(row, N - 1), column, d, inner, DEPTH).to(tl.bfloat16)
        tl.store(out + row[:, None].to(tl.int64) * inner + column[None, :], value,
                 mask=(row < N)[:, None] & (column < inner)[None, :])

    @triton.jit
    def place_kernel(x, y, weight, is_big, rank, total, h, order, N, d: tl.constexpr, WIDTH: tl.constexpr):
        """One program, one token: total = x + y, and its RMSNorm goes to its place in h, BIG tokens from the front, the
        others from the back. rank: how many are BIG up to here; order: of each place, its token."""
        token, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        n = tl.load(rank + token)
        place = tl.where(tl.load(is_big + token), n - 1, N - 1 - token + n)
        tl.store(order + place, token)
        a = tl.load(x + token * d + i, mask=i < d, other=0.0).to(tl.float32)
        a = (a + tl.load(y + token * d + i, mask=i < d, other=0.0).to(tl.float32)).to(tl.bfloat16)
        tl.store(total + token * d + i, a, mask=i < d)
        a = a.to(tl.float32)
        g = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
        tl.store(h + place * d + i, (a * tl.rsqrt(tl.sum(a * a) / d + 1e-5) * g).to(tl.bfloat16), mask=i < d)

    @triton.jit
    def routed_swiglu_kernel(h, w_big, w_small, rank, out_big, out_small, N, d: tl.constexpr, big: tl.constexpr,
                             small: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
        """swiglu_kernel for two FFNs: the first n_big rows of h by w_big, the others by w_small. How many tiles that
        is, only the GPU knows; so as many programs start as it runs at once, and share the tiles."""
        n_big = tl.load(rank + N - 1)
        big_rows, small_rows = tl.cdiv(n_big, ROWS), tl.cdiv(N - n_big, ROWS)
        big_tiles = big_rows * tl.cdiv(big, COLUMNS)
        for tile in range(tl.program_id(0), big_tiles + small_rows * tl.cdiv(small, COLUMNS), tl.num_programs(0)):
            if tile < big_tiles:
                weight, out, inner, first, last, i, rows = w_big, out_big, big, 0, n_big, tile, big_rows
            else:
                weight, out, inner, first, last = w_small, out_small, small, n_big, N
                i, rows = tile - big_tiles, small_rows
            row = first + (i % rows) * ROWS + tl.arange(0, ROWS)
            column = (i // rows) * COLUMNS + tl.arange(0, COLUMNS)
            value = swiglu_tile(h, weight, tl.minimum(row, N - 1), column, d, inner, DEPTH).to(tl.bfloat16)
            tl.store(out + row[:, None].to(tl.int64) * inner + column[None, :], value,
                     mask=(row < last)[:, None] & (column < inner)[None, :])

    @triton.jit
    def down_tile(x, h, weight, order, out, first, last, column, d: tl.constexpr, inner: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
        """out = x + h weight^T in a tile of rows first.. < last of h, each at its token's own place. h, weight: tensor
        descriptors, which give zeros beyond the edges."""
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, inner, DEPTH):
            total = tl.dot(h.load([first, k]), weight.load([column, k]).T, total)
        row, column = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        here = (row < last)[:, None] & (column < d)[None, :]
        at = tl.load(order + row, mask=row < last, other=0)[:, None].to(tl.int64) * d + column[None, :]
        total += tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(tl.bfloat16), mask=here)

    @triton.jit
    def routed_down_kernel(x, h_big, h_small, w_big, w_small, rank, order, out, N, d: tl.constexpr, big: tl.constexpr,
                           small: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
        """The way down, of rows sorted likewise, and back to the tokens' own places. SMALL's tiles, which are short, go
        first to the programs that have fewer of BIG's."""
        n_big = tl.load(rank + N - 1)
        big_rows, small_rows, columns = tl.cdiv(n_big, ROWS), tl.cdiv(N - n_big, ROWS), tl.cdiv(d, COLUMNS)
        for i in range(tl.program_id(0), big_rows * columns, tl.num_programs(0)):
            down_tile(x, h_big, w_big, order, out, (i % big_rows) * ROWS, n_big, (i // big_rows) * COLUMNS, d, big,
                      ROWS, COLUMNS, DEPTH)
        for i in range(tl.num_programs(0) - 1 - tl.program_id(0), small_rows * columns, tl.num_programs(0)):
            down_tile(x, h_small, w_small, order, out, n_big + (i % small_rows) * ROWS, N,
                      (i // small_rows) * COLUMNS, d, small, ROWS, COLUMNS, DEPTH)

    @triton.jit
    def own_key_kernel(q, k, v, past, log_sum, out, N, n, S, stride, H: tl.constexpr, D: tl.constexpr, scale,
                       ROWS: tl.constexpr):
        """One program: ROWS of the N = n S H (node, sequence, head) triples, see add_own_key."""
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        here, c = (i < N)[:, None], tl.arange(0, D)[None, :]
        row, head = i // H, i % H
        node, sequence = row // S, row % S
        strided = (row * stride + head * D)[:, None] + c
        packed = i[:, None] * D + c
        a = tl.load(q + strided, mask=here, other=0.0).to(tl.float32)
        b = tl.load(k + strided, mask=here, other=0.0).to(tl.float32)
        score = tl.sum(a * b, 1) * scale
        normalizer = tl.load(log_sum + (sequence * H + head) * n + node, mask=i < N, other=0.0)
        own = tl.sigmoid(score - normalizer)[:, None]
        value = tl.load(v + strided, mask=here, other=0.0).to(tl.float32)
        earlier = tl.load(past + packed, mask=here, other=0.0).to(tl.float32)
        tl.store(out + packed, (earlier + own * (value - earlier)).to(tl.bfloat16), mask=here)

    @triton.jit
    def dot_kernel(h, directions, out, S, M: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr):
        """One program, one row of h [n S, d]: its products with the M directions of its sequence."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        a = tl.load(h + row * d + i, mask=i < d, other=0.0).to(tl.float32)
        for m in range(M):
            b = tl.load(directions + ((row % S) * M + m) * d + i, mask=i < d, other=0.0)
            tl.store(out + row * M + m, tl.sum(a * b))

    @triton.jit
    def log_sum_exp_kernel(h, weight, out, N, V, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           DEPTH: tl.constexpr):
        """One program: ROWS rows of h against the whole vocabulary, COLUMNS entries at a time. The tile of logits z
        stays on chip; only a running maximum and sum of exponentials are kept of it (base 2, which is faster):

            m' = max(m, max_v z_v);   s' = s 2^(m - m') + sum_v 2^(z_v - m')
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        here = (row < N)[:, None]
        start_of_row = row[:, None].to(tl.int64) * d
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        s = tl.zeros((ROWS,), tl.float32)
        for first in range(0, V, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = (column < V)[:, None]
            z = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(0, d, DEPTH):
                part = k + tl.arange(0, DEPTH)[None, :]
                a = tl.load(h + start_of_row + part, mask=here & (part < d), other=0.0)
                b = tl.load(weight + column[:, None] * d + part, mask=inside & (part < d), other=0.0)
                z = tl.dot(a, b.T, z)
            z = tl.where((column < V)[None, :], z * 1.4426950408889634, float("-inf"))  # log2(e)
            new = tl.maximum(m, tl.max(z, 1))
            s = s * tl.exp2(m - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
            m = new
        tl.store(out + row, (m + tl.log2(s)) * 0.6931471805599453, mask=row < N)  # ln(2)


# Tile sizes and warps below are the fastest of the eight or more that were tried on an H100: at width 384, those of
# routed_ffn at 1,024.

def read_out_log_sum_exp(h, weight):
    """log sum_v exp(h . w_v), the logits' normalizer -> float32 [N]. h [N, d], weight [V, d], of one dtype.

    The kernel never writes the N x V logits, which for 4,096 routes and as many entries would be 32 MB a token.
    """
    N, d = h.shape
    if by_kernel(h):
        h, out = h.contiguous(), torch.empty(N, device=h.device)
        log_sum_exp_kernel[(triton.cdiv(N, 128),)](h, weight, out, N, len(weight), d, ROWS=128, COLUMNS=128, DEPTH=64,
                                                   num_warps=8, num_stages=3)
        return out
    # Logits piece by piece: on a CPU 8 MB of them, which stay in its cache; on a GPU 512 MB, which keep it busy.
    rows = 1 << max(6, (27 if h.is_cuda else 21) - len(weight).bit_length())
    return torch.cat([F.linear(part, weight).float().logsumexp(-1) for part in h.split(rows)])


def norm(x, weight):
    """RMSNorm of x [..., d], in float32."""
    if by_kernel(x):
        x, d = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        norm_kernel[(x.numel() // d,)](x, x, weight, x, out, d, WIDTH=triton.next_power_of_2(d), ADD=False, num_warps=1)
        return out
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps=1e-5).to(x.dtype)


def add_norm(x, y, weight):
    """-> x + y, and its RMSNorm. x, y [..., d]"""
    if by_kernel(x):
        x, y, d = x.contiguous(), y.contiguous(), x.shape[-1]
        total, out = torch.empty_like(x), torch.empty_like(x)
        norm_kernel[(x.numel() // d,)](x, y, weight, total, out, d, WIDTH=triton.next_power_of_2(d), ADD=True,
                                       num_warps=1)
        return total, out
    x = x + y
    return x, norm(x, weight)


def swiglu(h, weight):
    """SwiGLU's first half, silu(gate) * up with (gate, up) = h W^T. h [N, d], weight [2 inner, d] -> [N, inner]"""
    if by_kernel(h):
        h, (N, d), inner = h.contiguous(), h.shape, len(weight) // 2
        out = torch.empty(N, inner, device=h.device, dtype=h.dtype)
        columns = 128 if inner >= 128 else 64
        swiglu_kernel[(triton.cdiv(N, 128) * triton.cdiv(inner, columns),)](
            h, weight, out, N, d, inner, ROWS=128, COLUMNS=columns, DEPTH=64, num_warps=8, num_stages=4)
        return out
    gate, up = F.linear(h, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def routes_by_kernel(x, *inner):
    """Whether there are kernels for routed_ffn on x [.., d] with these inner widths: tensor descriptors want rows of
    whole 16 bytes, and its tiles 192 KB of shared memory, which Hopper has and the large Blackwells."""
    return (by_kernel(x) and all(width % 8 == 0 for width in (x.shape[-1], *inner))
            and torch.cuda.get_device_properties(x.device).major in (9, 10))


def routed_ffn(x, y, weight, is_big, big, small):
    """x + y + FFN(RMSNorm(x + y)), where a token's FFN is `big` or `small` (model.SwiGLU). x, y [B, T, d]; is_big: bool
    [B, T].

    By kernels each FFN runs on its own tokens, and yet no shape depends on how many they are: nothing has to wait for
    that number, and the whole forward of a routed model can be one CUDA graph. (The plain form runs both on all.)
    """
    inner = big.down.weight.shape[1], small.down.weight.shape[1]
    if not routes_by_kernel(x, *inner):
        x, h = add_norm(x, y, weight)
        return x + torch.where(is_big.unsqueeze(-1), big(h), small(h))
    x, y, is_big, shape = x.flatten(0, 1).contiguous(), y.flatten(0, 1).contiguous(), is_big.flatten(), x.shape
    N, d = x.shape
    rank = is_big.cumsum(0, dtype=torch.int32)
    total, h, out, order = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(rank)
    hidden = [torch.empty(N, width, device=x.device, dtype=x.dtype) for width in inner]
    up, down = ([layer.weight.to(x.dtype) for layer in layers]
                for layers in ((big.gate_up, small.gate_up), (big.down, small.down)))
    programs = (torch.cuda.get_device_properties(x.device).multi_processor_count,)
    place_kernel[(N,)](x, y, weight, is_big, rank, total, h, order, N, d, WIDTH=triton.next_power_of_2(d), num_warps=4)
    routed_swiglu_kernel[programs](h, *up, rank, *hidden, N, d, *inner, ROWS=128, COLUMNS=128, DEPTH=64, num_warps=8,
                                   num_stages=4)
    rows, columns = ([TensorDescriptor.from_tensor(t, [n, 64]) for t in of] for n, of in ((128, hidden), (256, down)))
    routed_down_kernel[programs](total, *rows, *columns, rank, order, out, N, d, *inner, ROWS=128, COLUMNS=256,
                                 DEPTH=64, num_warps=8, num_stages=4)
    return out.view(shape)


def past_attention(q, k, v):
    """q [n, S, H, D], k, v [S, H, t, D] -> softmax(q k / sqrt(D)) v [n, S, H, D], log of its normalizer [n, S, H]"""
    q = q.permute(1, 2, 0, 3)  # [S, H, n, D]
    if by_kernel(q) and q.shape[-1] % 8 == 0:  # the flash kernel knows no other widths
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.is_cuda and q.dtype == torch.float32:
        y, log_sum = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        log_sum = log_sum[..., :q.shape[2]]  # it comes padded
    else:
        scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # [S, H, n, t]
        log_sum = scores.logsumexp(-1)
        y = ((scores - log_sum.unsqueeze(-1)).exp() @ v.float()).to(q.dtype)
    return y.permute(2, 0, 1, 3), log_sum.permute(2, 0, 1)


def add_own_key(q, k, v, past, log_sum):
    """Attention over the past, completed by the token's own key and value -> [n, S, H, D]

    q, k, v, past [n, S, H, D]; past: softmax over the earlier keys, times their values; log_sum [n, S, H]: the log of
    that softmax's normalizer. One more key with score s has the weight e^s / (e^s + e^log_sum) = sigmoid(s - log_sum).
    """
    n, S, H, D = q.shape
    rows = (q.stride(1), D, 1)
    joint = all(t.stride()[1:] == rows and t.stride(0) == S * rows[0] for t in (q, k, v))  # parts of one product
    joint = joint and D & (D - 1) == 0  # Triton's ranges are powers of two
    if by_kernel(q) and joint and past.is_contiguous() and log_sum.permute(1, 2, 0).is_contiguous():
        out = torch.empty_like(past)
        N = n * S * H
        own_key_kernel[(triton.cdiv(N, 32),)](q, k, v, past, log_sum, out, N, n, S, rows[0], H, D, D ** -0.5, ROWS=32,
                                              num_warps=4)
        return out
    score = (q.float() * k.float()).sum(-1) * D ** -0.5
    weight = torch.sigmoid(score - log_sum).unsqueeze(-1)
    return torch.lerp(past.float(), v.float(), weight).to(q.dtype)


def dot(h, directions):
    """h [n, S, d], directions float32 [S, M, d] -> float32 [n, S, M]"""
    n, S, d = h.shape
    if by_kernel(h):
        h, directions = h.contiguous(), directions.contiguous()
        out = torch.empty(n, S, directions.shape[1], device=h.device)
        dot_kernel[(n * S,)](h, directions, out, S, directions.shape[1], d, WIDTH=triton.next_power_of_2(d),
                             num_warps=1)
        return out
    return (h.unsqueeze(2).float() * directions).sum(-1)
