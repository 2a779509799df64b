#include "kv_cache.h"

#include <stdlib.h>

#include "memory.h"

struct phi_kv {
    uint8_t *pages; /* [n_pages, n_layers, n_kv_heads, phi_kv_slice_bytes] */
    phi_kv_type type;
    size_t n_bytes;
    uint8_t *scratch; /* [scratch_bytes] */
    size_t scratch_bytes;
};

size_t phi_kv_page_bytes(const phi_model *model, phi_kv_type type) {
    return (size_t)model->n_layers * (size_t)model->n_kv_heads * phi_kv_slice_bytes(type, model->head_dim);
}

phi_kv_type phi_kv_type_of(const phi_kv *kv) { return kv->type; }

phi_status phi_kv_create(const phi_model *model, phi_kv_type type, int n_pages, phi_kv **kv) {
    phi_kv *k = calloc(1, sizeof *k);
    if (!k) return PHI_OUT_OF_MEMORY;
    k->n_bytes = (size_t)n_pages * phi_kv_page_bytes(model, type);
    k->type = type;
    k->pages = phi_map(k->n_bytes);
    if (!k->pages) {
        free(k);
        return PHI_OUT_OF_MEMORY;
    }
    *kv = k;
    return PHI_OK;
}

void phi_kv_free(phi_kv *kv) {
    if (!kv) return;
    phi_unmap(kv->pages, kv->n_bytes);
    if (kv->scratch) phi_unmap(kv->scratch, kv->scratch_bytes);
    free(kv);
}

uint8_t *phi_kv_page(const phi_model *model, const phi_kv *kv, int page) {
    return kv->pages + (size_t)page * phi_kv_page_bytes(model, kv->type);
}

uint8_t *phi_kv_first_slice(const phi_model *model, const phi_kv *kv, int layer, int kv_head) {
    const size_t head = (size_t)layer * (size_t)model->n_kv_heads + (size_t)kv_head;
    return kv->pages + head * phi_kv_slice_bytes(kv->type, model->head_dim);
}

uint8_t *phi_kv_scratch(phi_kv *kv, size_t n_bytes) {
    if (n_bytes > kv->scratch_bytes) {
        if (kv->scratch) phi_unmap(kv->scratch, kv->scratch_bytes);
        kv->scratch = phi_map(n_bytes);
        kv->scratch_bytes = kv->scratch ? n_bytes : 0;
    }
    return kv->scratch;
}
