use std::time::Instant;
use tenora::adapter::Lora;
use tenora::model::Model;
use tenora::model::exec::*;
use tenora::model::traced::*;
use tenora::request::LoraSpec;
fn main() {
    let path = tenora::bases::find(tenora::bases::DEFAULT).unwrap().unwrap();
    let t = Instant::now();
    let (model, _) = Model::load(&path).unwrap();
    println!("load {:?}", t.elapsed());
    let mut exec = Exec::new(model.clone(), KvLayout { block_tokens: 16, blocks: 400 }).unwrap();
    let blocks: Vec<u32> = (0..64).collect();
    let ids: Vec<u32> = (0..512).map(|i| 1000 + i * 7).collect();
    for _ in 0..2 {
        let t = Instant::now();
        for c in 0..8 {
            exec.forward(&[Span {
                ids: &ids[c * 64..c * 64 + 64],
                start: c * 64,
                blocks: &blocks,
                lora: None,
                logits: LogitRows::Last,
            }])
            .unwrap();
        }
        println!("prefill 512: {:.0} tok/s", 512.0 / t.elapsed().as_secs_f64());
    }
    let t = Instant::now();
    for i in 0..32 {
        exec.forward(&[Span {
            ids: &ids[i..i + 1],
            start: 128 + i,
            blocks: &blocks,
            lora: None,
            logits: LogitRows::Last,
        }])
        .unwrap();
    }
    println!("decode 1: {:.1} ms/tok", t.elapsed().as_secs_f64() * 1000.0 / 32.0);
    let tables: Vec<Vec<u32>> = (0..16).map(|s| (s * 12..s * 12 + 12).collect()).collect();
    let spec = LoraSpec::default();
    let lora = Lora::fresh(&spec, model.shape(), 1).unwrap();
    let served = std::sync::Arc::new(lora.clone());
    for l in [None, Some(&served)] {
        let t = Instant::now();
        for i in 0..8 {
            let spans: Vec<Span> = tables
                .iter()
                .map(|b| Span { ids: &ids[i..i + 1], start: 120 + i, blocks: b, lora: l, logits: LogitRows::Last })
                .collect();
            exec.forward(&spans).unwrap();
        }
        println!("decode 16 lora={}: {:.1} ms/step", l.is_some(), t.elapsed().as_secs_f64() * 1000.0 / 8.0);
    }
    let traced = TracedLora::trainable(&lora).unwrap();
    for n in [256usize, 512] {
        let seqs: Vec<&[u32]> = ids[..n].chunks(64).collect();
        let wanted: Vec<_> = (0..seqs.len()).flat_map(|s| (32..63).map(move |i| (s, i))).collect();
        let t = Instant::now();
        let l = model.token_logprobs(&seqs, &wanted, Pass { lora: Some(&traced), ..Pass::default() }).unwrap();
        let f = t.elapsed();
        let loss = l.sum_all().unwrap();
        let g = loss.backward().unwrap();
        println!(
            "train {n}: fwd {:?} total {:?} = {:.0} tok/s ({})",
            f,
            t.elapsed(),
            n as f64 / t.elapsed().as_secs_f64(),
            g.get(traced.vars()[0].2.as_tensor()).is_some()
        );
    }
}
