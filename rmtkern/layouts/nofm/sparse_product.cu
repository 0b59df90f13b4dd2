// y = activation(x W^T + bias) * scale + residual of a 2:4 weight W [N, K] on sparse tensor cores (compute capability
// 8.0 on): mma.sp m16n8k32, x [T, K] and the result float16 or bfloat16, sums in float32, rounded once.
//
// The sparse operand of mma.sp is its first one, so W stands there and a block computes BN features by BM tokens, which
// is a tile of y transposed; shared memory turns it on the way to the epilogue. Tiles of x, of the kept entries and of
// the metadata come by asynchronous copies, STAGES deep. Nothing is read beyond an array: columns outside are zeros, rows outside the last row once more.
//
// Options of the compiler: BM, BN, BK, WARPS, STAGES (gpu_configs.py), BF16 (else float16), ACTIVATION (the order of
// ACTIVATIONS in sparse_product.py), GATED (pairs.py), X_PIECE and W_PIECE: bytes of one copy of x (8, 16) and of the
// kept entries (4, 16), by which their rows and addresses are divisible.
//
// Source of the fragments and of the metadata's order: PTX ISA, "Matrix multiply-accumulate operation using mma.sp".

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char byte;

constexpr int THREADS = 32 * WARPS;
constexpr int WARPS_N = 2, WARPS_M = WARPS / WARPS_N;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // tokens and features of a warp
constexpr int GROUP = 8;                             // tiles of tokens before the next columns, as in layouts/triton.py
constexpr int X_ROW = 2 * BK, W_ROW = BK;            // bytes of a row of a tile
constexpr int X_TILE = BM * X_ROW, W_TILE = BN * W_ROW, META_TILE = BK / 32 * BN * 4;
constexpr int STAGE = X_TILE + W_TILE + META_TILE;
constexpr int PITCH = BN + 4;                        // floats from one token to the next in the turned tile

static_assert(WN % 32 == 0 && WM % 8 == 0 && BK % 64 == 0, "a warp has words of metadata of 32 features");
static_assert(STAGES >= 2, "a step is loaded while another one is multiplied");

extern __shared__ __align__(128) byte shared[];

// Where byte `at` of a row lies in a tile: pieces of 16 bytes are exchanged, so that one piece of eight rows that follow
// each other lies in all banks.
template <int ROW>
__device__ __forceinline__ int place(int row, int at) {
    const int turn = ROW == 64 ? row >> 1 & 3 : row & 7;
    return row * ROW + (at ^ turn << 4);
}

// Begin to copy BYTES to shared memory; zeros if they are not `there`, and then nothing is read.
template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const void* from, bool there) {
    const u64 global = __cvta_generic_to_global(from);
    const int bytes = there ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 load_word(u32 from) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
    return word;
}

// Four 8 x 8 matrices of 16 bits; a lane gives the address of a row.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

#if BF16
#define NUMBERS "f32.bf16.bf16.f32"
#else
#define NUMBERS "f32.f16.f16.f32"
#endif
#define MULTIPLY(selector)                                                                                    \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." NUMBERS                            \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " selector \
                 ";"                                                                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e))

// d [16 features, 8 tokens] += W x^T over 32 columns; e is the metadata of 32 features, `lower` the second 16 of them.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 e, bool lower) {
    if (lower)
        MULTIPLY("0x1");
    else
        MULTIPLY("0x0");
}

__device__ __forceinline__ float number(u16 bits) {
#if BF16
    return __uint_as_float(u32(bits) << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ __forceinline__ u16 rounded(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ float activation(float v) {
#if ACTIVATION == 1  // gelu
    return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
#elif ACTIVATION == 2  // gelu_tanh: v / 2 (1 + tanh(u / 2)) = v sigmoid(u)
    return __fdividef(v, 1.0f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
#elif ACTIVATION == 3  // relu, which keeps NaN
    return v < 0.0f ? 0.0f : v;
#elif ACTIVATION == 4  // silu
    return __fdividef(v, 1.0f + __expf(-v));
#else
    return v;
#endif
}

// The copies of this thread to a tile of HEIGHT rows of ROW bytes, PIECE bytes each.
template <int HEIGHT, int ROW, int PIECE>
struct Copies {
    static constexpr int PIECES = ROW / PIECE, COUNT = HEIGHT * PIECES / THREADS, APART = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0 && HEIGHT % APART == 0, "as many copies for each thread");
    const byte* from[COUNT];
    int row, at;  // of its first piece

    // `first`: of `rows` rows that are `pitch` bytes apart; the last one stands for those beyond it.
    __device__ __forceinline__ Copies(const byte* first, u32 pitch, int rows)
        : row(threadIdx.x / PIECES), at(threadIdx.x % PIECES * PIECE) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) from[i] = first + u64(min(row + i * APART, rows - 1)) * pitch + at;
    }

    // Copy the next ROW bytes of each row, of which there are `left`; the others are zeros.
    __device__ __forceinline__ void next(u32 tile, int left) {
        const u32 to = tile + place<ROW>(row, at);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const u32 here = APART % 8 == 0 ? to + i * APART * ROW : tile + place<ROW>(row + i * APART, at);
            copy<PIECE>(here, from[i], at < left);
            from[i] += ROW;
        }
    }
};

// x [T, K], kept [N, K / 2] (the two entries of each four columns), meta [2 ceil(K / 64), 32 ceil(N / 32)], bias [N],
// scale [F], residual and y [T, F]; F = N, or half of it if GATED. bias, scale, residual may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    sparse_product_kernel(const u16* __restrict__ x, const u16* __restrict__ kept, const u32* __restrict__ meta,
                          const u16* __restrict__ bias, const u16* __restrict__ scale,
                          const u16* __restrict__ residual, u16* __restrict__ y, int T, int N, int F, int K) {
    const int columns = (N - 1) / BN + 1, tiles = (T - 1) / BM + 1;
    const int group = blockIdx.x / (GROUP * columns) * GROUP, height = min(tiles - group, GROUP);
    const int within = blockIdx.x % (GROUP * columns);
    const int first_token = (group + within % height) * BM, first = within / height * BN;
    const int tokens = min(T - first_token, BM), padded = (N + 31) / 32 * 32;

    Copies<BM, X_ROW, X_PIECE> copies_of_x((const byte*)x + u64(first_token) * u32(2 * K), 2 * K, tokens);
    Copies<BN, W_ROW, W_PIECE> copies_of_w((const byte*)kept + u64(first) * u32(K), K, min(N - first, BN));
    constexpr int META_PIECES = BN / 4;
    static_assert(BK / 32 * META_PIECES <= THREADS, "at most one copy of metadata for each thread");
    const u32* const words = meta + min(first + int(threadIdx.x) % META_PIECES * 4, padded - 4);
    const int last = (K + 63) / 64 * 2 - 1;  // beyond the last words zeros are multiplied, by any metadata

    const auto load = [&](int step, u32 stage) {
        copies_of_x.next(stage, 2 * (K - step * BK));
        copies_of_w.next(stage + X_TILE, K - step * BK);
        const int block = step * (BK / 32) + threadIdx.x / META_PIECES;
        if (threadIdx.x < BK / 32 * META_PIECES)
            copy<16>(stage + X_TILE + W_TILE + 16 * threadIdx.x, words + u64(min(block, last)) * u32(padded), true);
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_token = warp / WARPS_N * WM, warp_feature = warp % WARPS_N * WN;
    const u32 begin = __cvta_generic_to_shared(shared);
    // Where a lane reads in a stage, for the first 32 columns; for the next ones other bits of it change.
    const u32 x_at = place<X_ROW>(warp_token + lane % 8, lane / 8 * 16);
    const u32 w_at = place<W_ROW>(warp_feature + lane % 16, lane / 16 * 16);
    const u32 meta_at = X_TILE + W_TILE + 4 * (warp_feature + lane);
    float d[WN / 16][WM / 8][4] = {};

    const int steps = (K + BK - 1) / BK;
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step, begin + step * STAGE);
        commit();
    }
    u32 stage = begin, next = begin + (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();  // this step's copies of this thread
        __syncthreads();     // those of the others; and all have read the stage that is copied to next
        if (step + STAGES - 1 < steps) load(step + STAGES - 1, next);
        commit();
#pragma unroll
        for (int block = 0; block < BK / 32; ++block) {
            u32 a[WN / 16][4], b[WM / 8][4], e[WN / 32];
            const u32 w_here = stage + X_TILE + (w_at ^ 32 * block), x_here = stage + (x_at ^ 64 * block);
#pragma unroll
            for (int i = 0; i < WN / 32; ++i) e[i] = load_word(stage + meta_at + 4 * (block * BN + 32 * i));
#pragma unroll
            for (int i = 0; i < WN / 16; ++i) load_matrices(a[i], w_here + 16 * i * W_ROW);
#pragma unroll
            for (int j = 0; j < WM / 8; ++j) load_matrices(b[j], x_here + 8 * j * X_ROW);
#pragma unroll
            for (int i = 0; i < WN / 16; ++i)
#pragma unroll
                for (int j = 0; j < WM / 8; ++j) multiply(d[i][j], a[i], b[j], e[i / 2], i % 2);
        }
        stage = stage + STAGE == begin + STAGES * STAGE ? begin : stage + STAGE;
        next = next + STAGE == begin + STAGES * STAGE ? begin : next + STAGE;
    }

    __syncthreads();  // all have read the last stage, which the results take the place of
    float* const turned = (float*)shared;
#pragma unroll
    for (int i = 0; i < WN / 16; ++i)
#pragma unroll
        for (int j = 0; j < WM / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int feature = warp_feature + 16 * i + lane / 4 + r / 2 * 8;
                const int token = warp_token + 8 * j + lane % 4 * 2 + r % 2;
                turned[token * PITCH + feature] = d[i][j][r];
            }
    __syncthreads();

    // A thread finishes four outputs that follow each other, of every ROWS-th token.
    constexpr int QUADS = BN / (GATED ? 8 : 4), ROWS = THREADS / QUADS;
    static_assert(BM % ROWS == 0 && THREADS % QUADS == 0, "as many tokens for each thread");
    const int quad = threadIdx.x % QUADS;
    const int column = GATED ? quad / 2 * 16 + quad % 2 * 4 : 4 * quad;  // in the tile; the up is 8 further
    const int output = first / (GATED ? 2 : 1) + 4 * quad;
    if (output >= F) return;
    float added[4], added_up[4], factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool there = output + i < F;
        added[i] = there && bias ? number(bias[first + column + i]) : 0.0f;
        added_up[i] = GATED && there && bias ? number(bias[first + column + 8 + i]) : 0.0f;
        factor[i] = there && scale ? number(scale[output + i]) : 1.0f;
    }
    const bool whole = F % 4 == 0 && ((u64)y | (u64)residual) % 8 == 0;  // four at once
#pragma unroll 1
    for (int row = threadIdx.x / QUADS; row < tokens; row += ROWS) {
        const float4 sums = *(const float4*)(turned + row * PITCH + column);
        const u64 at = u64(first_token + row) * u32(F) + output;
        float values[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = activation(values[i] + added[i]);
        if constexpr (GATED) {
            const float4 up = *(const float4*)(turned + row * PITCH + column + 8);
            const float ups[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] *= ups[i] + added_up[i];
        }
        if (scale)
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] *= factor[i];
        if (whole) {
            if (residual) {
                const ushort4 more = *(const ushort4*)(residual + at);
                values[0] += number(more.x), values[1] += number(more.y);
                values[2] += number(more.z), values[3] += number(more.w);
            }
            *(ushort4*)(y + at) =
                make_ushort4(rounded(values[0]), rounded(values[1]), rounded(values[2]), rounded(values[3]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (output + i < F) y[at + i] = rounded(residual ? values[i] + number(residual[at + i]) : values[i]);
        }
    }
}
