/* y = x w^T for few rows of x, in float32: what a decoding step spends its time on.

   A pass over a few tokens should cost what reading the weights once costs. So weights stay as
   they are, [n][k]; a tile of some of their rows meets all rows of x before the next tile, and
   while it is computed the next tile is fetched, which the hardware's own prefetchers do not do
   across rows this short. Accumulators and one vector of each operand fill the 32 registers.

   Every output is summed in the same order, whatever the number of rows or its place among
   them, so a token's result does not depend, to the bit, on what shares its pass. */

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define LANES 16
#define TARGET __attribute__((target("avx512f")))

/* R rows of w from w on, M rows of x: y[m][r] of a row length n. */
#define DEFINE_TILE(M, R)                                                                       \
    TARGET static void tile_##M##_##R(const float *x, const float *w, float *y, size_t n,       \
                                      size_t k)                                                 \
    {                                                                                           \
        __m512 sums[R][M];                                                                      \
        for (int r = 0; r < R; r++)                                                             \
            for (int m = 0; m < M; m++)                                                         \
                sums[r][m] = _mm512_setzero_ps();                                               \
        for (size_t i = 0; i < k; i += LANES) {                                                 \
            __m512 weights[R];                                                                  \
            for (int r = 0; r < R; r++) {                                                       \
                weights[r] = _mm512_loadu_ps(w + r * k + i);                                    \
                _mm_prefetch((const char *)(w + (r + R) * k + i), _MM_HINT_T0);                 \
            }                                                                                   \
            for (int m = 0; m < M; m++) {                                                       \
                __m512 values = _mm512_loadu_ps(x + m * k + i);                                 \
                for (int r = 0; r < R; r++)                                                     \
                    sums[r][m] = _mm512_fmadd_ps(weights[r], values, sums[r][m]);               \
            }                                                                                   \
        }                                                                                       \
        for (int r = 0; r < R; r++)                                                             \
            for (int m = 0; m < M; m++)                                                         \
                y[m * n + r] = _mm512_reduce_add_ps(sums[r][m]);                                \
    }

#define MOST_ROWS 8 /* of x in one tile */

#define DEFINE_TILES(M, R) DEFINE_TILE(M, R) DEFINE_TILE(M, 1)

DEFINE_TILES(1, 8)
DEFINE_TILES(2, 8)
DEFINE_TILES(3, 8)
DEFINE_TILES(4, 6)
DEFINE_TILES(5, 5)
DEFINE_TILES(6, 4)
DEFINE_TILES(7, 3)
DEFINE_TILES(8, 3)

typedef void (*Tile)(const float *, const float *, float *, size_t, size_t);

typedef struct {
    size_t height; /* rows of w */
    Tile whole;
    Tile single;
} Tiles;

static const Tiles TILES[MOST_ROWS + 1] = {
    {0, NULL, NULL},
    {8, tile_1_8, tile_1_1}, {8, tile_2_8, tile_2_1}, {8, tile_3_8, tile_3_1},
    {6, tile_4_6, tile_4_1}, {5, tile_5_5, tile_5_1}, {4, tile_6_4, tile_6_1},
    {3, tile_7_3, tile_7_1}, {3, tile_8_3, tile_8_1},
};

int amusd_rows_supported(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

/* x [rows][k], w [n][k] -> y [rows][n]; k is a multiple of 16. */
void amusd_rows(const float *x, const float *w, float *y, size_t rows, size_t n, size_t k)
{
    size_t height = TILES[rows < MOST_ROWS ? rows : MOST_ROWS].height;
    for (size_t at = 0; at < n; at += height) {
        size_t left = n - at < height ? n - at : height;
        for (size_t row = 0; row < rows; row += MOST_ROWS) {
            const Tiles *tiles = &TILES[rows - row < MOST_ROWS ? rows - row : MOST_ROWS];
            size_t done = 0;
            for (; done + tiles->height <= left; done += tiles->height)
                tiles->whole(x + row * k, w + (at + done) * k, y + row * n + at + done, n, k);
            for (; done < left; done++)
                tiles->single(x + row * k, w + (at + done) * k, y + row * n + at + done, n, k);
        }
    }
}

/* y = weight * x / sqrt(mean(x^2) + eps) of each row of x [rows][k]; k is a multiple of 16. */
TARGET void amusd_rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t k,
                           float eps)
{
    for (size_t row = 0; row < rows; row++, x += k, y += k) {
        __m512 squares = _mm512_setzero_ps();
        for (size_t i = 0; i < k; i += LANES) {
            __m512 values = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        float mean = _mm512_reduce_add_ps(squares) / (float)k;
        __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps));
        for (size_t i = 0; i < k; i += LANES) {
            __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
            _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_loadu_ps(weight + i), scaled));
        }
    }
}

#else

int amusd_rows_supported(void) { return 0; }

void amusd_rows(const float *x, const float *w, float *y, size_t rows, size_t n, size_t k)
{
    (void)x, (void)w, (void)y, (void)rows, (void)n, (void)k;
}

void amusd_rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t k, float eps)
{
    (void)x, (void)weight, (void)y, (void)rows, (void)k, (void)eps;
}

#endif
