//! The test cluster's certificate authority: a certificate for the API server, one for a client, and the key that signs
//! ServiceAccount tokens. All live in the test's folder and die with it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The files of a certificate authority.
#[derive(Clone, Debug)]
pub struct Authority {
    /// Its certificate.
    pub certificate: PathBuf,
    /// The API server's certificate.
    pub server_certificate: PathBuf,
    /// The API server's key.
    pub server_key: PathBuf,
    /// A cluster administrator's certificate.
    pub client_certificate: PathBuf,
    /// A cluster administrator's key.
    pub client_key: PathBuf,
    /// The key that signs ServiceAccount tokens.
    pub account_key: PathBuf,
    /// The key that proves them.
    pub account_public_key: PathBuf,
}

impl Authority {
    /// Makes one in a folder; the API server answers at these addresses.
    pub fn new(folder: &Path, addresses: &[IpAddr]) -> Result<Self> {
        let authority = Self {
            certificate: folder.join("ca.crt"),
            server_certificate: folder.join("apiserver.crt"),
            server_key: folder.join("apiserver.key"),
            client_certificate: folder.join("admin.crt"),
            client_key: folder.join("admin.key"),
            account_key: folder.join("accounts.key"),
            account_public_key: folder.join("accounts.pub"),
        };
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params
            .distinguished_name
            .push(DnType::CommonName, "sluice test authority");
        write(&authority.certificate, &params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);

        let mut names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        names.extend(["localhost".to_owned(), "kubernetes.default.svc".to_owned()]);
        let mut server = CertificateParams::new(names)?;
        server
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        authority.sign(
            &server,
            &issuer,
            &authority.server_certificate,
            &authority.server_key,
        )?;

        let mut client = CertificateParams::new(Vec::new())?;
        client.distinguished_name.push(DnType::CommonName, "admin");
        client
            .distinguished_name
            .push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        authority.sign(
            &client,
            &issuer,
            &authority.client_certificate,
            &authority.client_key,
        )?;

        let accounts = KeyPair::generate()?;
        write(&authority.account_key, &accounts.serialize_pem())?;
        write(&authority.account_public_key, &accounts.public_key_pem())?;
        Ok(authority)
    }

    fn sign(
        &self,
        params: &CertificateParams,
        issuer: &Issuer<'_, KeyPair>,
        certificate: &Path,
        key: &Path,
    ) -> Result<()> {
        let pair = KeyPair::generate()?;
        write(certificate, &params.signed_by(&pair, issuer)?.pem())?;
        write(key, &pair.serialize_pem())
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
