/* One decode step of a Llama-shaped model: one token, one row, weights int8 or int4, keys and values float32.
 *
 * All threads run the whole step together and meet at five barriers a block; what is small (norms, turned queries) each
 * of them works out for itself instead of waiting. Sums are float32, activations are never rounded.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define GROUP 32
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* rows x columns. bits 8: `weights` int8 [rows, columns], `scales` [rows].
 * bits 4: `weights` [rows, columns / 2], byte i of a group of 32 holds weight i (low) and weight i + 16 (high);
 * `scales` [rows, columns / 32, 2] = (scale, least), so that a weight is q * scale + least, q from 0 to 15. */
typedef struct {
    const void *weights;
    const float *scales, *bias;
    int64_t rows, columns, bits;
} Matrix;

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *before_attention, *before_mlp, *query_norm, *key_norm;
} Block;

typedef struct {
    int64_t blocks, width, heads, kv_heads, head_dim, inner;
    float epsilon, scale;
    const Block *block;
    const float *norm;
    Matrix head;
} Model;

/* Where this token goes: `turns` is cosine and sine at its stream position, then at its cache position. */
typedef struct {
    float *const *keys, *const *values; /* a block: [kv_heads, capacity, head_dim] */
    int64_t capacity, slot, filled, sinks;
    const float *turns; /* [4, head_dim / 2] */
} Slots;

/* `LANES` small integers as floats: what __builtin_convertvector does one by one (gcc 12), 10 times as slow. */
#ifdef __AVX512F__
#include <immintrin.h>
static inline vec signed_bytes(const int8_t *p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void nibbles(const uint8_t *p, vec *low, vec *high) {
    __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    *low = (vec)_mm512_cvtepi32_ps(_mm512_and_epi32(q, _mm512_set1_epi32(15)));
    *high = (vec)_mm512_cvtepi32_ps(_mm512_srli_epi32(q, 4));
}
#else
static inline vec signed_bytes(const int8_t *p) {
    float out[LANES];
    vec v;
    for (int i = 0; i < LANES; i++) out[i] = p[i];
    memcpy(&v, out, sizeof(v));
    return v;
}
static inline void nibbles(const uint8_t *p, vec *low, vec *high) {
    float a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = p[i] & 15, b[i] = p[i] >> 4;
    memcpy(low, a, sizeof(vec)), memcpy(high, b, sizeof(vec));
}
#endif

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline float dot(const float *a, const float *b, int64_t n) {
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += *(const vec *)(a + i) * *(const vec *)(b + i);
    return sum(total);
}

static inline float dot8(const Matrix *m, const float *x, int64_t row) {
    const int8_t *w = (const int8_t *)m->weights + row * m->columns;
    vec a = {0}, b = {0};
    for (int64_t i = 0; i < m->columns; i += 2 * LANES) {
        a += signed_bytes(w + i) * *(const vec *)(x + i);
        b += signed_bytes(w + i + LANES) * *(const vec *)(x + i + LANES);
    }
    return sum(a + b) * m->scales[row];
}

/* `sums` [columns / 32] are the sums of x over each group: what `least` is multiplied by. */
static inline float dot4(const Matrix *m, const float *x, const float *sums, int64_t row) {
    int64_t groups = m->columns / GROUP;
    const uint8_t *w = (const uint8_t *)m->weights + row * m->columns / 2;
    const float *scales = m->scales + row * groups * 2;
    vec total = {0};
    float least = 0;
    for (int64_t g = 0; g < groups; g++) {
        vec low, high;
        nibbles(w + g * LANES, &low, &high);
        const float *part = x + g * GROUP;
        total += (low * *(const vec *)part + high * *(const vec *)(part + LANES)) * scales[2 * g];
        least += scales[2 * g + 1] * sums[g];
    }
    return sum(total) + least;
}

static inline float product(const Matrix *m, const float *x, const float *sums, int64_t row) {
    float y = m->bits == 4 ? dot4(m, x, sums, row) : dot8(m, x, row);
    return m->bias ? y + m->bias[row] : y;
}

static void group_sums(const Matrix *m, const float *x, float *sums) {
    if (m->bits != 4) return;
    for (int64_t g = 0; g < m->columns / GROUP; g++)
        sums[g] = sum(*(const vec *)(x + g * GROUP) + *(const vec *)(x + g * GROUP + LANES));
}

static void normalise(const float *x, const float *weight, float *out, int64_t n, float epsilon) {
    float factor = 1 / sqrtf(dot(x, x, n) / n + epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
}

/* Turn one head: dimension i with i + dim / 2. */
static void turn(const float *head, const float *turns, float *out, int64_t dim) {
    int64_t half = dim / 2;
    const float *cosine = turns, *sine = turns + half;
    for (int64_t i = 0; i < half; i++) {
        out[i] = head[i] * cosine[i] - head[i + half] * sine[i];
        out[i + half] = head[i + half] * cosine[i] + head[i] * sine[i];
    }
}

/* e^x for x <= 0, relative error 2e-7: 2^whole from the exponent bits, 2^rest from its series. */
static inline vec exponential(vec x) {
    vec scaled = x * 1.44269504f, power;
    ints floor = scaled < -126.f; /* 2^-126 stands for all that is smaller */
    scaled = (vec)(((ints)scaled & ~floor) | ((ints)(scaled * 0 - 126.f) & floor));
    ints whole = __builtin_convertvector(scaled - 0.5f, ints), bits = (whole + 127) << 23;
    vec rest = (scaled - __builtin_convertvector(whole, vec)) * 0.693147181f;
    vec tail = 1 / 6.f + rest * (1 / 24.f + rest * (1 / 120.f + rest * (1 / 720.f)));
    memcpy(&power, &bits, sizeof(power));
    return power * (1 + rest * (1 + rest * (1 / 2.f + rest * tail)));
}

/* Attention of one thread over its share of the slots. `part` takes, a head: greatest score, sum, values [dim]. */
static void attend(const Model *m, const Slots *s, int64_t layer, const float *qkv, float *part, float *room,
                   int64_t begin, int64_t end) {
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads;
    const Block *block = m->block + layer;
    float *scores = room, *recent = room + group * s->capacity, *fixed = recent + group * dim, *head = fixed + group * dim;
    for (int64_t kv = 0; kv < m->kv_heads; kv++) {
        float *keys = s->keys[layer] + kv * s->capacity * dim, *values = s->values[layer] + kv * s->capacity * dim;
        if (begin <= s->slot && s->slot < end) {
            const float *key = qkv + (m->heads + kv) * dim;
            if (block->key_norm) normalise(key, block->key_norm, head, dim, m->epsilon), key = head;
            turn(key, s->turns, keys + s->slot * dim, dim);
            memcpy(values + s->slot * dim, qkv + (m->heads + m->kv_heads + kv) * dim, dim * sizeof(float));
        }
        for (int64_t h = 0; h < group; h++) {
            const float *query = qkv + (kv * group + h) * dim;
            if (block->query_norm) normalise(query, block->query_norm, head, dim, m->epsilon), query = head;
            turn(query, s->turns, recent + h * dim, dim);
            turn(query, s->turns + dim, fixed + h * dim, dim);
        }
        for (int64_t j = begin; j < end; j++)
            for (int64_t h = 0; h < group; h++)
                scores[h * s->capacity + j - begin] =
                    dot((j < s->sinks ? fixed : recent) + h * dim, keys + j * dim, dim) * m->scale;
        for (int64_t h = 0; h < group; h++) {
            float *mine = scores + h * s->capacity, *out = part + (kv * group + h) * (dim + 2), most = -INFINITY;
            float total = 0;
            for (int64_t j = 0; j < end - begin; j++) most = mine[j] > most ? mine[j] : most;
            for (int64_t j = 0; j < end - begin; j += LANES) {
                vec x;
                for (int i = 0; i < LANES; i++) x[i] = j + i < end - begin ? mine[j + i] - most : 0;
                x = exponential(x);
                for (int i = 0; i < LANES && j + i < end - begin; i++) mine[j + i] = x[i], total += x[i];
            }
            out[0] = most, out[1] = total;
            memset(out + 2, 0, dim * sizeof(float));
        }
        for (int64_t j = begin; j < end; j++)
            for (int64_t h = 0; h < group; h++) {
                float weight = scores[h * s->capacity + j - begin], *out = part + (kv * group + h) * (dim + 2) + 2;
                for (int64_t i = 0; i < dim; i += LANES) *(vec *)(out + i) += weight * *(const vec *)(values + j * dim + i);
            }
    }
}

/* One softmax from the threads' shares: [heads * dim]. */
static void combine(const Model *m, const float *parts, int64_t stride, int threads, float *out) {
    int64_t dim = m->head_dim;
    for (int64_t h = 0; h < m->heads; h++) {
        float most = -INFINITY, total = 0;
        for (int t = 0; t < threads; t++) most = fmaxf(most, parts[t * stride + h * (dim + 2)]);
        memset(out + h * dim, 0, dim * sizeof(float));
        for (int t = 0; t < threads; t++) {
            const float *part = parts + t * stride + h * (dim + 2);
            if (part[1] == 0) continue;
            float factor = expf(part[0] - most);
            total += factor * part[1];
            for (int64_t i = 0; i < dim; i++) out[h * dim + i] += factor * part[2 + i];
        }
        for (int64_t i = 0; i < dim; i++) out[h * dim + i] /= total;
    }
}

/* Floats of scratch memory that `sinks_step` needs. */
int64_t sinks_scratch(const Model *m, int64_t capacity, int threads) {
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads, widest = m->width > m->inner ? m->width : m->inner;
    widest = widest > m->heads * dim ? widest : m->heads * dim;
    int64_t shared = (m->heads + 2 * m->kv_heads) * dim + m->inner + threads * m->heads * (dim + 2);
    int64_t own = 2 * widest + group * (capacity + LANES) + (2 * group + 1) * dim;
    return shared + threads * (own + LANES) + LANES;
}

/* `states` [width] is the token's embedding, overwritten; `logits` [rows of the head]. */
void sinks_step(const Model *m, const Slots *s, float *states, float *logits, float *scratch, int threads) {
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads, attended = m->heads * dim, stride = m->heads * (dim + 2);
    int64_t widest = m->width > m->inner ? m->width : m->inner;
    widest = widest > attended ? widest : attended;
    float *qkv = scratch, *inner = qkv + (m->heads + 2 * m->kv_heads) * dim, *parts = inner + m->inner;
    float *rest = parts + threads * stride;
    int64_t own = 2 * widest + group * (s->capacity + LANES) + (2 * group + 1) * dim;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        float *x = rest + me * own, *sums = x + widest, *room = sums + widest;
#define SHARE(rows) for (int64_t row = (rows) * me / all, last = (rows) * (me + 1) / all; row < last; row++)
        for (int64_t layer = 0; layer < m->blocks; layer++) {
            const Block *b = m->block + layer;
            normalise(states, b->before_attention, x, m->width, m->epsilon);
            group_sums(&b->qkv, x, sums);
            SHARE(b->qkv.rows) qkv[row] = product(&b->qkv, x, sums, row);
#pragma omp barrier
            attend(m, s, layer, qkv, parts + me * stride, room, s->filled * me / all, s->filled * (me + 1) / all);
#pragma omp barrier
            combine(m, parts, stride, all, x);
            group_sums(&b->out, x, sums);
            SHARE(m->width) states[row] += product(&b->out, x, sums, row);
#pragma omp barrier
            normalise(states, b->before_mlp, x, m->width, m->epsilon);
            group_sums(&b->gate_up, x, sums);
            SHARE(m->inner) {
                float gate = product(&b->gate_up, x, sums, row), up = product(&b->gate_up, x, sums, m->inner + row);
                inner[row] = gate / (1 + expf(-gate)) * up;
            }
#pragma omp barrier
            group_sums(&b->down, inner, sums);
            SHARE(m->width) states[row] += product(&b->down, inner, sums, row);
#pragma omp barrier
        }
        normalise(states, m->norm, x, m->width, m->epsilon);
        group_sums(&m->head, x, sums);
        SHARE(m->head.rows) logits[row] = product(&m->head, x, sums, row);
    }
}
