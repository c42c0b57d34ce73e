/* One step of generation on a CPU: n tokens, T of each text, through the blocks and the head of
   model.py, as fast as weights can be read. decoder.py compiles it for one model: C, F, H, K, L, V
   are its shape, in the letters of model.py, EPS is that of its norms. BITS and HEAD_BITS are 8 or
   4 for weights as quantize.py packs them, 0 for full ones. These, keys and values are float if
   FLOAT, else bf16.

   All threads run all of this. `omp for` shares the iterations of a loop among them. */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads(void) { return 1; }
#endif
#if __AVX512VNNI__ && __AVX512VL__
#define dpbusd _mm256_dpbusd_epi32
#elif __AVXVNNI__
#define dpbusd _mm256_dpbusd_avx_epi32
#endif
#ifdef dpbusd
#include <immintrin.h>
#endif

enum { D = C / H, GROUP = 64, QKV = C + 2 * K * D, LARGEST = QKV > 2 * F ? QKV : 2 * F };
enum { C_GROUPS = (C + GROUP - 1) / GROUP, F_GROUPS = (F + GROUP - 1) / GROUP };
enum { GROUPS = C_GROUPS > F_GROUPS ? C_GROUPS : F_GROUPS, WIDTH = GROUPS * GROUP };

static inline uint32_t bits_of(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline float float_of(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }
#if FLOAT
typedef float number;
static inline float to_float(number x) { return x; }
static inline number to_number(float x) { return x; }
#else
typedef uint16_t number;                            /* bf16 is the upper half of a float, rounded */
static inline float to_float(number x) { return from_bf16(x); }
static inline number to_number(float x) {
    return (bits_of(x) + 0x7fff + (bits_of(x) >> 16 & 1)) >> 16;
}
#endif

typedef struct { const void *weight; const uint16_t *scale; } Linear;
typedef struct {
    const float *attn_norm; Linear qkv, o; const float *mlp_norm; Linear gate_up, down;
    number *keys, *values;                          /* (texts, K, S, D) */
} Layer;
typedef struct { Layer layers[L]; const float *norm; Linear head; } Model;

/* The input of the next product; the same as whole numbers, times a scale per group; the sums of
   groups, for the offset that the whole numbers of weights are stored with; and a product. */
static float input[MAX_TOKENS][WIDTH];
static int8_t rounded[MAX_TOKENS][WIDTH];
static float scales[MAX_TOKENS][GROUPS];
static int sums[MAX_TOKENS][GROUPS];
static float product[MAX_TOKENS * LARGEST];

/* Waits for all threads. OpenMP's own wait lasts longer than a turn of the scheduler: on a busy
   machine threads would wait for one another by turns, and keep the processor meanwhile. */
static void barrier(void) {
    static atomic_int arrived, turn;
    int now = turn;
    if (++arrived == omp_get_num_threads()) {
        arrived = 0;
        turn++;
    } else
        for (int spins = 0; turn == now; spins++) if (spins > 10000) sched_yield();
}

/* e^x to seven digits: 2^whole 2^f, as a polynomial. Unlike expf, it takes many numbers at once. */
static inline float exponential(float x) {
    x *= 1.44269504f;
    x = x < -126 ? -126 : x > 126 ? 126 : x;
    float whole = rintf(x), f = x - whole;
    return float_of((uint32_t)((int)whole + 127) << 23) * (1 + f * (.693147181f + f * (
        .240226507f + f * (.0555041087f + f * (.00961812911f + f * (.00133335581f + f *
        .000154035304f))))));
}

/* Rounds group g of the input of token t, I wide, to int8, as quantize.round_input does. */
static void round_group(long t, long g, long I) {
    float *x = input[t] + g * GROUP;
    uint32_t most = 0;                              /* as bits, NaN is the largest */
    for (long i = I - g * GROUP; i < GROUP; i++) x[i] = 0;
    for (int i = 0; i < GROUP; i++) most = (bits_of(x[i]) << 1) > most ? bits_of(x[i]) << 1 : most;
    float scale = float_of(most >> 1) / 127, inverse = scale > 1e-37f ? 1 / scale : 0;
    int sum = 0;
    for (int i = 0; i < GROUP; i++) sum += rounded[t][g * GROUP + i] = (int)rintf(x[i] * inverse);
    scales[t][g] = scale;
    sums[t][g] = sum;
}

/* Row o of a weight, in `bits` or in full (0), times the input of token t, I wide. */
static inline float dot(Linear w, int bits, long o, long I, long t) {
    float sum = 0;
    if (bits == 0) {
        const number *row = (const number *)w.weight + o * I;
        for (long i = 0; i < I; i++) sum += to_float(row[i]) * input[t][i];
        return sum;
    }
    long groups = (I + GROUP - 1) / GROUP;
    const uint8_t *row = (const uint8_t *)w.weight + o * groups * GROUP * bits / 8;
    const int8_t *x = rounded[t];
    float factors[GROUPS];
    for (long g = 0; g < groups; g++)
        factors[g] = from_bf16(w.scale[o * groups + g]) * scales[t][g];
#ifdef dpbusd                           /* what compilers make of the loops below is half as fast */
    __m256 eight = _mm256_setzero_ps();
    for (long g = 0; bits == 4 && g < groups; g++, row += GROUP / 2, x += GROUP) {
        _mm_prefetch(row + 2048, _MM_HINT_T0);
        __m256i bytes = _mm256_loadu_si256((const __m256i *)row), low = _mm256_set1_epi8(15);
        __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
        __m256i whole = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-8 * sums[t][g]));
        whole = dpbusd(whole, _mm256_and_si256(bytes, low), *(const __m256i_u *)x);
        whole = dpbusd(whole, second, *(const __m256i_u *)(x + GROUP / 2));
        eight = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(factors[g]), eight);
    }
    for (int i = 0; i < 8; i++) sum += eight[i];
    if (bits == 4) return sum;
#endif
    for (long g = 0; g < groups; g++, row += GROUP * bits / 8, x += GROUP) {
        int whole = -(1 << (bits - 1)) * sums[t][g];
        for (int i = 0; bits == 8 && i < GROUP; i++) whole += row[i] * x[i];
        int half = bits == 4 ? GROUP / 2 : 0;
        for (int i = 0; i < half; i++) whole += (row[i] & 15) * x[i];
        for (int i = 0; i < half; i++) whole += (row[i] >> 4) * x[half + i];
        sum += factors[g] * whole;
    }
    return sum;
}

/* y (n, O) = the input (n, I) times weightᵀ, or, for `add`, what y was and that. */
static inline void linear(Linear w, int bits, long O, long I, long n, float *y, int add) {
#pragma omp for schedule(static) nowait
    for (long o = 0; o < O; o++)
        for (long t = 0; t < n; t++)
            y[t * O + o] = dot(w, bits, o, I, t) + (add ? y[t * O + o] : 0);
    barrier();
}

/* The norm of x (n, C) becomes the input. */
static void rms_norm(const float *weight, long n, const float *x) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < n; t++) {
        float sum = 0;
        for (long i = 0; i < C; i++) sum += x[t * C + i] * x[t * C + i];
        float factor = 1 / sqrtf(sum / C + EPS);
        for (long i = 0; i < C; i++) input[t][i] = x[t * C + i] * factor * weight[i];
        for (long g = 0; g < C_GROUPS; g++) round_group(t, g, C);
    }
    barrier();
}

/* Turns x[i] and x[i + D / 2] of a head (D) by their angle. */
static void rotate(float *x, const float *cosines, const float *sines) {
    for (int i = 0; i < D / 2; i++) {
        float left = x[i], right = x[i + D / 2];
        x[i] = left * cosines[i] - right * sines[i];
        x[i + D / 2] = right * cosines[i] + left * sines[i];
    }
}

/* y (D) = the attention of a query to the first `seen` keys and values (S, D). */
static void attention(const float *q, const number *keys, const number *values, long seen,
                      float *y) {
    float p[seen], most = -INFINITY, total = 0, sum[D] = {0};
    for (long s = 0; s < seen; s++) {
        float score = 0;
        for (int i = 0; i < D; i++) score += q[i] * to_float(keys[s * D + i]);
        p[s] = score / sqrtf(D);
        most = p[s] > most ? p[s] : most;
    }
    for (long s = 0; s < seen; s++) total += p[s] = exponential(p[s] - most);
    for (long s = 0; s < seen; s++)
        for (int i = 0; i < D; i++) sum[i] += p[s] * to_float(values[s * D + i]);
    for (int i = 0; i < D; i++) y[i] = sum[i] / total;
}

/* x (n, C) are the embeddings of the tokens, cosines and sines (n, D) of the angles of their
   positions (n). Adds to the keys and values of each text, S at most, and writes logits (n, V). */
void decode(const Model *model, int num_threads, long n, long T, long S, const int64_t *positions,
            const float *cosines, const float *sines, float *x, float *logits) {
#pragma omp parallel num_threads(num_threads)
    {
        for (const Layer *layer = model->layers; layer < model->layers + L; layer++) {
            rms_norm(layer->attn_norm, n, x);
            linear(layer->qkv, BITS, QKV, C, n, product, 0);
#pragma omp for schedule(static) nowait
            for (long i = 0; i < n * (H + K); i++) {
                long t = i / (H + K), h = i % (H + K);      /* query heads, then key heads */
                float *head = product + t * QKV + h * D;
                rotate(head, cosines + t * D, sines + t * D);
                long place = ((t / T * K + h - H) * S + positions[t]) * D;
                for (long j = 0; j < D && h >= H; j++) {
                    layer->keys[place + j] = to_number(head[j]);
                    layer->values[place + j] = to_number(head[K * D + j]);
                }
            }
            barrier();
#pragma omp for schedule(static) nowait
            for (long i = 0; i < n * H; i++) {
                long t = i / H, h = i % H, place = (t / T * K + h / (H / K)) * S * D;
                attention(product + t * QKV + h * D, layer->keys + place, layer->values + place,
                          positions[t] + 1, input[t] + h * D);
            }
            barrier();
#pragma omp for schedule(static) nowait
            for (long i = 0; i < n * C_GROUPS; i++) round_group(i / C_GROUPS, i % C_GROUPS, C);
            barrier();
            linear(layer->o, BITS, C, C, n, x, 1);

            rms_norm(layer->mlp_norm, n, x);
            linear(layer->gate_up, BITS, 2 * F, C, n, product, 0);
#pragma omp for schedule(static) nowait
            for (long i = 0; i < n * F_GROUPS; i++) {
                long t = i / F_GROUPS, g = i % F_GROUPS;
                const float *gate = product + t * 2 * F, *up = gate + F;
                for (long j = g * GROUP; j < (g + 1) * GROUP && j < F; j++)
                    input[t][j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
                round_group(t, g, F);
            }
            barrier();
            linear(layer->down, BITS, C, F, n, x, 1);
        }
        rms_norm(model->norm, n, x);
        linear(model->head, HEAD_BITS, V, C, n, logits, 0);
    }
}
