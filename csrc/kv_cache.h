/* The KV cache's memory: pages [n_pages, n_layers, n_kv_heads, phi_kv_slice_bytes], and a scratch buffer. */
#ifndef PHI_KV_CACHE_H
#define PHI_KV_CACHE_H

#include "kernels.h"

phi_kv_type phi_kv_type_of(const phi_kv *kv);

/* The slice of a layer and KV head in page 0. Its slice in page p is p * phi_kv_page_bytes after it. */
uint8_t *phi_kv_first_slice(const phi_model *model, const phi_kv *kv, int layer, int kv_head);

/* A buffer of at least n_bytes with undefined content, valid until the next call. NULL if it cannot be allocated. */
uint8_t *phi_kv_scratch(phi_kv *kv, size_t n_bytes);

#endif
