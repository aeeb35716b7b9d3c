//! What becomes of the head's products: logits.

use crate::arch::config::LogitConfig;
use crate::kernels::cpu;

impl LogitConfig {
    /// Whether products are logits as they are.
    pub(super) fn is_plain(&self) -> bool {
        self.scale == 1.0 && self.softcap.is_none()
    }

    /// Turns products into logits.
    pub(super) fn apply(&self, products: &mut [f32]) {
        if self.scale != 1.0 {
            products.iter_mut().for_each(|x| *x *= self.scale);
        }
        if let Some(cap) = self.softcap {
            cpu::softcap(products, cap);
        }
    }

    /// Turns gradients of these logits into those of the products.
    pub(super) fn backward(&self, logits: &[f32], gradients: &mut [f32]) {
        if let Some(cap) = self.softcap {
            cpu::softcap_backward(logits, gradients, cap);
        }
        if self.scale != 1.0 {
            gradients.iter_mut().for_each(|d| *d *= self.scale);
        }
    }
}
