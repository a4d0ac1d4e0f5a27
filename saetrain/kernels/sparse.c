/* The sparse step on a CPU: the k largest of each row, products of chosen rows, sums of chosen rows.

   Each function is one pass that reads what is chosen and nothing else, so its cost is the memory that
   it touches: no (slots, D) tensor, no sort of the slots, no heap of candidates. Every result is made by
   one thread in an order that depends on its own slots alone: the same for any number of threads.

   Selection: a bound from below for the k-th largest is the k-th largest of 8k or more maxima of
   groups of the row; what is not below it, hardly more than k, decides exactly. That is two passes
   over a row that is in cache, 16 numbers an instruction where the processor has AVX-512. NaN counts
   as larger than all, as in torch.topk.

   Shapes: B tokens, D width of a row, F latents, K slots a token. Indices are int64, as torch has them.
   Functions that return int give 0, or -1 without memory, or -2 for an index that is out of range. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define GROUPS 8 /* maxima for each of the k */
#define AHEAD 4  /* slots between the fetch of a row and its use */
#define INFINITE __builtin_inff()
#define PAD LANES /* numbers that a vector may be stored beyond the last one */

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline v16 *vec(const float *p) { return (v16 *)p; }

/* -- rows --------------------------------------------------------------------------------------- */

static void fetch(const float *row, int64_t d) {
    for (int64_t i = 0; i < d; i += LANES) __builtin_prefetch(row + i);
}

static float dot(const float *a, const float *b, int64_t d) {
    v16 sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] += *vec(a + i + j * LANES) * *vec(b + i + j * LANES);
    for (; i + LANES <= d; i += LANES) sums[0] += *vec(a + i) * *vec(b + i);
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int j = 0; j < LANES; j++) total += sums[0][j];
    for (; i < d; i++) total += a[i] * b[i];
    return total;
}

static int outside(int64_t index, int64_t n) { return (uint64_t)index >= (uint64_t)n; }

/* out[b, j] = x[b] . W[indices[b, j]]; 0 where `used` is given and is 0. */
int dot_rows(const float *x, const float *W, int64_t n_latents, const int64_t *indices, const uint8_t *used,
             int64_t n, int64_t k, int64_t d, float *out, int threads) {
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : wrong) if (threads > 1)
    for (int64_t b = 0; b < n; b++)
        for (int64_t s = b * k; s < (b + 1) * k; s++) {
            out[s] = 0;
            if (used != NULL && !used[s]) continue;
            if (outside(indices[s], n_latents)) {
                wrong = 1;
                continue;
            }
            int64_t later = s + AHEAD < n * k ? indices[s + AHEAD] : 0;
            if (!outside(later, n_latents)) fetch(W + later * d, d);
            out[s] = dot(x + b * d, W + indices[s] * d, d);
        }
    return wrong ? -2 : 0;
}

#define BLOCK 128 /* channels whose sums stay in registers */

/* out = sum over the slots of weights[slot] * rows[which[slot]]; slots of weight 0 are not read. */
static void weighted(float *out, const float *rows, int64_t d, const int64_t *which, const float *weights,
                     int64_t n) {
    int64_t first = 0;
    for (; first + BLOCK <= d; first += BLOCK) {
        v16 sums[BLOCK / LANES];
        memset(sums, 0, sizeof sums);
        for (int64_t s = 0; s < n; s++) {
            if (weights[s] == 0) continue;
            const float *row = rows + which[s] * d + first;
            for (int j = 0; j < BLOCK / LANES; j++) sums[j] += weights[s] * *vec(row + j * LANES);
        }
        for (int j = 0; j < BLOCK / LANES; j++) *vec(out + first + j * LANES) = sums[j];
    }
    if (first == d) return;
    memset(out + first, 0, (size_t)(d - first) * sizeof(float));
    for (int64_t s = 0; s < n; s++) {
        if (weights[s] == 0) continue;
        const float *row = rows + which[s] * d;
        for (int64_t i = first; i < d; i++) out[i] += weights[s] * row[i];
    }
}

/* out[b] = sum over the k slots of b of values * W[indices]. */
int decode_rows(const float *values, const int64_t *indices, int64_t n, int64_t k, const float *W,
                int64_t n_latents, int64_t d, float *out, int threads) {
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : wrong) if (threads > 1)
    for (int64_t b = 0; b < n; b++) {
        int out_of_range = 0;
        for (int64_t s = b * k; s < (b + 1) * k; s++) out_of_range |= outside(indices[s], n_latents);
        if (out_of_range)
            wrong = 1;
        else
            weighted(out + b * d, W, d, indices + b * k, values + b * k, k);
    }
    return wrong ? -2 : 0;
}

/* out[f] = sum over the slots with latent f of weights * x[b], in the order of the slots; every row of `out` is
   written. Slots are put in order by counting. */
int sum_by_latent(const float *x, const float *weights, const int64_t *indices, int64_t n, int64_t k,
                  int64_t n_latents, int64_t d, float *out, int threads) {
    for (int64_t s = 0; s < n * k; s++)
        if (outside(indices[s], n_latents)) return -2;
    int64_t *ends = calloc((size_t)n_latents + 1, sizeof *ends);
    int64_t *tokens = malloc((size_t)(n * k + 1) * sizeof *tokens);
    float *sorted = malloc((size_t)(n * k + 1) * sizeof *sorted);
    int failed = ends == NULL || tokens == NULL || sorted == NULL;
    if (!failed) {
        for (int64_t s = 0; s < n * k; s++) ends[indices[s] + 1] += weights[s] != 0;
        for (int64_t f = 0; f < n_latents; f++) ends[f + 1] += ends[f];
        /* From here on ends[f] is where the next slot of f goes: at last where those of f end. */
        for (int64_t b = 0; b < n; b++)
            for (int64_t s = b * k; s < (b + 1) * k; s++)
                if (weights[s] != 0) {
                    int64_t at = ends[indices[s]]++;
                    tokens[at] = b, sorted[at] = weights[s];
                }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) if (threads > 1)
        for (int64_t f = 0; f < n_latents; f++) {
            int64_t first = f ? ends[f - 1] : 0;
            weighted(out + f * d, x, d, tokens + first, sorted + first, ends[f] - first);
        }
    }
    free(ends), free(tokens), free(sorted);
    return failed ? -1 : 0;
}

/* -- selection ---------------------------------------------------------------------------------- */

/* Append the lanes of `row` that are not below the bound, and their places. How many. */
static inline int64_t keep(const float *row, int64_t first, float bound, float *values, int32_t *places) {
#ifdef __AVX512F__
    __m512 v = _mm512_loadu_ps(row + first);
    __mmask16 found = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ);
    if (!found) return 0;
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int)first),
                                  _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(found, v));
    _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(found, at));
    return __builtin_popcount(found);
#else
    int64_t n = 0;
    for (int64_t i = first; i < first + LANES; i++) {
        values[n] = row[i], places[n] = (int32_t)i;
        n += row[i] >= bound;
    }
    return n;
#endif
}

/* Put what is above the pivot into `high` and what is below it to the front of `a`. */
static void part(float *a, int64_t n, float pivot, float *high, int64_t *n_high, int64_t *n_low) {
    int64_t above = 0, below = 0, i = 0;
#ifdef __AVX512F__
    __m512 p = _mm512_set1_ps(pivot);
    for (; i < n; i += LANES) {
        __mmask16 inside = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 v = _mm512_loadu_ps(a + i);
        __mmask16 up = _mm512_mask_cmp_ps_mask(inside, v, p, _CMP_GT_OQ);
        __mmask16 down = _mm512_mask_cmp_ps_mask(inside, v, p, _CMP_LT_OQ);
        _mm512_storeu_ps(high + above, _mm512_maskz_compress_ps(up, v));
        _mm512_storeu_ps(a + below, _mm512_maskz_compress_ps(down, v));
        above += __builtin_popcount(up), below += __builtin_popcount(down);
    }
#else
    for (; i < n; i++) {
        float v = a[i];
        high[above] = v, above += v > pivot;
        a[below] = v, below += v < pivot;
    }
#endif
    *n_high = above, *n_low = below;
}

static float middle(float a, float b, float c) {
    if ((a < b) == (b < c)) return b;
    return (b < a) == (a < c) ? a : c;
}

/* The k-th largest of n numbers without NaN, 1 <= k <= n, by partition. Overwrites both, of n + 2 * PAD. */
static float kth_largest(float *a, float *other, int64_t n, int64_t k) {
    for (;;) {
        if (n == 1) return a[0];
        float pivot = middle(a[0], a[n / 2], a[n - 1]);
        int64_t above, below;
        part(a, n, pivot, other, &above, &below);
        if (k <= above) {
            float *swap = a;
            a = other, other = swap, n = above;
        } else if (k <= n - below) {
            return pivot;
        } else {
            k -= n - below, n = below;
        }
    }
}

/* Whether there is a NaN among n numbers, a multiple of LANES. */
static int any_nan(const float *row, int64_t n) {
    int nan = 0;
    for (int64_t i = 0; i < n; i++) nan |= row[i] != row[i];
    return nan;
}

/* The maxima of groups of numbers that lie `width` apart; n and width are multiples of LANES. 1 if there is a
   NaN, which they then do not show. */
static int maxima(const float *row, int64_t n, int64_t width, float *most) {
    int nan = any_nan(row, width);
    memcpy(most, row, (size_t)width * sizeof *most);
    for (int64_t first = width; first < n; first += width) {
        int64_t here = n - first < width ? n - first : width;
#ifdef __AVX512F__
        __mmask16 odd = 0;
        for (int64_t j = 0; j < here; j += LANES) {
            __m512 v = _mm512_loadu_ps(row + first + j);
            odd |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            _mm512_storeu_ps(most + j, _mm512_max_ps(_mm512_loadu_ps(most + j), v));
        }
        nan |= odd != 0;
#else
        for (int64_t j = 0; j < here; j++) {
            float v = row[first + j];
            nan |= v != v;
            most[j] = v > most[j] ? v : most[j];
        }
#endif
    }
    return nan;
}

struct scratch { /* of one thread, n + 3 * PAD numbers each */
    float *row, *values, *a, *b;
    int32_t *places;
};

/* The places of the k largest of n numbers; `padded`, a multiple of LANES, is how many `row` has, the last
   ones -infinity. -1 if there is a NaN. */
static int choose(const float *row, int64_t n, int64_t padded, int64_t k, const struct scratch *s,
                  int64_t *indices) {
    int64_t width = (GROUPS * k + LANES - 1) / LANES * LANES, found = 0, taken = 0;
    float bound = -INFINITE;
    if (2 * width <= n) {
        if (maxima(row, padded, width, s->a)) return -1;
        bound = kth_largest(s->a, s->b, width, k);
    } else if (any_nan(row, padded)) {
        return -1;
    }
    for (int64_t i = 0; i < padded; i += LANES)
        found += keep(row, i, bound, s->values + found, s->places + found);
    memcpy(s->a, s->values, (size_t)found * sizeof(float));
    bound = kth_largest(s->a, s->b, found, k);
    for (int64_t i = 0; i < found; i++)
        if (s->values[i] > bound) indices[taken++] = s->places[i];
    for (int64_t i = 0; taken < k; i++) /* the padding comes last */
        if (s->values[i] == bound) indices[taken++] = s->places[i];
    return 0;
}

static float widened(const void *row, int64_t i, int half) {
    if (!half) return ((const float *)row)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One row: values in its own type, and places. */
static void topk_row(const void *row, int half, int64_t n, int64_t k, const struct scratch *s, void *values,
                     int64_t *indices) {
    int64_t padded = (n + LANES - 1) / LANES * LANES;
    const float *numbers = row;
    if (half || padded != n) {
        for (int64_t i = 0; i < padded; i++) s->row[i] = i < n ? widened(row, i, half) : -INFINITE;
        numbers = s->row;
    }
    if (choose(numbers, n, padded, k, s, indices)) {
        for (int64_t i = 0; i < padded; i++) {
            float v = i < n ? widened(row, i, half) : -INFINITE;
            s->row[i] = v != v ? INFINITE : v;
        }
        choose(s->row, n, padded, k, s, indices);
    }
    for (int64_t i = 0; i < k; i++) {
        if (half)
            ((uint16_t *)values)[i] = ((const uint16_t *)row)[indices[i]];
        else
            ((float *)values)[i] = ((const float *)row)[indices[i]];
    }
}

/* The k largest of each row of float32, or of bfloat16 where `half`, and their places, in no order;
   1 <= k <= n < 2^31. 0, or -1 without memory. */
int topk_rows(const void *rows, int half, int64_t n_rows, int64_t n, int64_t k, void *values,
              int64_t *indices, int threads) {
    int failed = 0;
    int64_t size = n + 3 * PAD, bytes = half ? 2 : 4;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *memory = malloc((size_t)(5 * size) * sizeof *memory);
        struct scratch s = {memory, memory + size, memory + 2 * size, memory + 3 * size,
                            (int32_t *)(memory + 4 * size)};
        if (memory == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_rows; i++)
            if (memory != NULL)
                topk_row((const char *)rows + i * n * bytes, half, n, k, &s, (char *)values + i * k * bytes,
                         indices + i * k);
        free(memory);
    }
    return failed ? -1 : 0;
}

/* -- what is above a floor ---------------------------------------------------------------------- */

/* One bit for each of the 16 numbers from `row` on that is not at most its floor; NaN is not. */
static inline uint32_t bits_above(const float *row, const float *floor) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(row), _mm512_loadu_ps(floor), _CMP_NLE_UQ);
#else
    uint32_t bits = 0;
    int some = 0;
    for (int j = 0; j < LANES; j++) some |= !(row[j] <= floor[j]);
    for (int j = 0; some && j < LANES; j++) bits |= (uint32_t)!(row[j] <= floor[j]) << j;
    return bits;
#endif
}

static inline uint32_t bits_at(const float *row, const float *floor, int64_t first, int64_t n) {
    if (first + LANES <= n) return bits_above(row + first, floor + first);
    uint32_t bits = 0;
    for (int64_t i = first; i < n; i++) bits |= (uint32_t)!(row[i] <= floor[i]) << (i - first);
    return bits;
}

/* counts[b] = how many of the n numbers of row b are above the floors of their columns. */
void count_above(const float *h, int64_t n_rows, int64_t n, const float *floor, int64_t *counts,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < n_rows; b++) {
        counts[b] = 0;
        for (int64_t i = 0; i < n; i += LANES)
            counts[b] += __builtin_popcount(bits_at(h + b * n, floor, i, n));
    }
}

/* Those numbers and their columns, of row b from place starts[b] on, in order. */
void list_above(const float *h, int64_t n_rows, int64_t n, const float *floor, const int64_t *starts,
                float *values, int64_t *columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < n_rows; b++) {
        int64_t at = starts[b];
        for (int64_t i = 0; i < n; i += LANES)
            for (uint32_t bits = bits_at(h + b * n, floor, i, n); bits; bits &= bits - 1, at++) {
                columns[at] = i + __builtin_ctz(bits);
                values[at] = h[b * n + columns[at]];
            }
    }
}
