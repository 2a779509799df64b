/* Where a head's keys and values lie: pages [page][layer][kv head][phi_kv_slice_bytes]. */
#ifndef PHI_KV_CACHE_H
#define PHI_KV_CACHE_H

#include "kernels.h"

phi_kv_type phi_kv_type_of(const phi_kv *kv);

/* A head's part of page 0; page p is p * phi_kv_page_bytes further. */
uint8_t *phi_kv_head(const phi_model *model, const phi_kv *kv, int layer, int kv_head);

/* Working memory of a forward pass, kept from call to call; its content is undefined. NULL when the system refuses. */
uint8_t *phi_kv_scratch(phi_kv *kv, size_t n_bytes);

#endif
