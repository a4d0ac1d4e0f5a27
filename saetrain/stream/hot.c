/* The stream's hot path: chunks read, checked, and their rows copied to shuffled places.

   One call does it for several chunks without Python, so that reading threads do not wait for each
   other's interpreter. Whatever is unusual makes it stop and say where; Python then does that chunk
   again and names what is wrong.

   Copies: the places lie all over a window that is much larger than the cache, so a plain copy
   first fetches every line from memory that it is about to overwrite. Streaming stores do not, and
   leave the cache to the chunk that is being copied: 0.03 s/GB against 0.085 of numpy.

   Checksums: crc32c (Castagnoli) by the instruction of SSE 4.2, three neighbouring runs at once, since
   a result takes three cycles. Runs are joined with the operator that appends zero bytes, a 32 x 32
   matrix over GF(2) found by repeated squaring. */

#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __x86_64__
#include <nmmintrin.h>
#endif

#define LARGE (16 << 20) /* bytes of a window that no cache holds for long */
#define RUN 8192         /* bytes of one of three checksums that are computed at once */
#define POLYNOMIAL 0x82f63b78u

/* -- checksums ---------------------------------------------------------------------------------- */

static uint32_t apply(const uint32_t *matrix, uint32_t vector) {
    uint32_t sum = 0;
    for (; vector; vector >>= 1, matrix++)
        if (vector & 1) sum ^= *matrix;
    return sum;
}

static void square(uint32_t *result, const uint32_t *matrix) {
    for (int i = 0; i < 32; i++) result[i] = apply(matrix, matrix[i]);
}

/* What n zero bytes do to the state of a checksum. */
static void zeros(uint32_t *result, int64_t n) {
    uint32_t power[32], next[32];
    power[0] = POLYNOMIAL; /* one zero bit */
    for (int i = 1; i < 32; i++) power[i] = 1u << (i - 1);
    for (int i = 0; i < 32; i++) result[i] = 1u << i;
    for (uint64_t bits = (uint64_t)n * 8; bits; bits >>= 1) {
        if (bits & 1)
            for (int i = 0; i < 32; i++) result[i] = apply(power, result[i]);
        square(next, power);
        memcpy(power, next, sizeof power);
    }
}

#ifdef __x86_64__
static uint64_t word(const uint8_t *data) {
    uint64_t value;
    memcpy(&value, data, 8);
    return value;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c(const uint8_t *data, int64_t size,
                                                         const uint32_t *shift) {
    uint32_t state = 0xffffffffu;
    for (; size >= 3 * RUN; data += 3 * RUN, size -= 3 * RUN) {
        uint64_t a = state, b = 0, c = 0;
        for (int64_t i = 0; i < RUN; i += 8) {
            a = _mm_crc32_u64(a, word(data + i));
            b = _mm_crc32_u64(b, word(data + RUN + i));
            c = _mm_crc32_u64(c, word(data + 2 * RUN + i));
        }
        state = apply(shift, apply(shift, (uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
    }
    for (; size >= 8; data += 8, size -= 8) state = (uint32_t)_mm_crc32_u64(state, word(data));
    for (; size > 0; data++, size--) state = _mm_crc32_u8(state, *data);
    return ~state;
}

static int can_check(void) { return __builtin_cpu_supports("sse4.2"); }
#else
static uint32_t crc32c(const uint8_t *data, int64_t size, const uint32_t *shift) {
    (void)data, (void)size, (void)shift;
    return 0;
}

static int can_check(void) { return 0; }
#endif

/* 0 and the checksum of the bytes, or -1 on processors that `fill_rows` is not for. */
int checksum(const uint8_t *data, int64_t size, uint32_t *result) {
    uint32_t shift[32];
    if (!can_check()) return -1;
    zeros(shift, RUN);
    *result = crc32c(data, size, shift);
    return 0;
}

/* -- copies ------------------------------------------------------------------------------------- */

static void plain(uint8_t *to, const uint8_t *from, int64_t size) { memcpy(to, from, (size_t)size); }

#ifdef __x86_64__
static void streaming(uint8_t *to, const uint8_t *from, int64_t size) {
    for (int64_t i = 0; i < size; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
}
#endif

/* to[at[i]] = rows[which[i]]; `which` may be NULL: 0, 1, 2 … `to` has n_to rows, `rows` n_rows, of
   row_bytes each. 0, or -1 without having written anything if a number is out of range. */
int scatter_rows(uint8_t *to, int64_t n_to, const int64_t *at, const uint8_t *rows, int64_t n_rows,
                 const int64_t *which, int64_t n, int64_t row_bytes) {
    if (which == NULL && n > n_rows) return -1;
    for (int64_t i = 0; i < n; i++) {
        if (at[i] < 0 || at[i] >= n_to) return -1;
        if (which != NULL && (which[i] < 0 || which[i] >= n_rows)) return -1;
    }
    void (*copy)(uint8_t *, const uint8_t *, int64_t) = plain;
#ifdef __x86_64__
    int aligned = row_bytes % 16 == 0 && (uintptr_t)to % 16 == 0;
    if (aligned && n_to * row_bytes >= LARGE) copy = streaming;
#endif
    for (int64_t i = 0; i < n; i++)
        copy(to + at[i] * row_bytes, rows + (which ? which[i] : i) * row_bytes, row_bytes);
#ifdef __x86_64__
    _mm_sfence(); /* other threads see the rows once this one says it is done */
#endif
    return 0;
}

/* -- both, after reading ------------------------------------------------------------------------ */

struct job { /* one chunk */
    int64_t file, offset, n;
    const int64_t *at, *which; /* (n,) each, as in scatter_rows */
};

static int read_all(int file, uint8_t *to, int64_t size, int64_t offset) {
    while (size > 0) {
        ssize_t found = pread(file, to, (size_t)size, (off_t)offset);
        if (found < 0 && errno == EINTR) continue;
        if (found <= 0) return -1;
        to += found, size -= found, offset += found;
    }
    return 0;
}

/* How many of the chunks were done before one that was not: cut, damaged, or asked for wrongly.

   A chunk has n_rows rows and then the four bytes of its checksum; `scratch` holds both. */
int64_t fill_rows(const struct job *jobs, int64_t n_jobs, uint8_t *scratch, int64_t n_rows,
                  int64_t row_bytes, uint8_t *to, int64_t n_to) {
    int64_t size = n_rows * row_bytes;
    uint32_t shift[32];
    if (!can_check()) return 0;
    zeros(shift, RUN);
    for (int64_t i = 0; i < n_jobs; i++) {
        const struct job *job = jobs + i;
        if (read_all((int)job->file, scratch, size + 4, job->offset)) return i;
        const uint8_t *end = scratch + size;
        uint32_t stored = (uint32_t)end[0] | (uint32_t)end[1] << 8 | (uint32_t)end[2] << 16 |
                          (uint32_t)end[3] << 24;
        if (crc32c(scratch, size, shift) != stored) return i;
        if (scatter_rows(to, n_to, job->at, scratch, n_rows, job->which, job->n, row_bytes))
            return i;
    }
    return n_jobs;
}
