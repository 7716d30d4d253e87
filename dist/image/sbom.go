package image

import (
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// What follows is SPDX 2.3, as much of it as is used.
type spdxDocument struct {
	SPDXVersion       string             `json:"spdxVersion"`
	DataLicense       string             `json:"dataLicense"`
	SPDXID            string             `json:"SPDXID"`
	Name              string             `json:"name"`
	DocumentNamespace string             `json:"documentNamespace"`
	CreationInfo      spdxCreation       `json:"creationInfo"`
	Packages          []spdxPackage      `json:"packages"`
	Relationships     []spdxRelationship `json:"relationships"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	SPDXID           string         `json:"SPDXID"`
	Name             string         `json:"name"`
	VersionInfo      string         `json:"versionInfo"`
	Purpose          string         `json:"primaryPackagePurpose,omitempty"`
	DownloadLocation string         `json:"downloadLocation"`
	FilesAnalyzed    bool           `json:"filesAnalyzed"`
	LicenseConcluded string         `json:"licenseConcluded"`
	LicenseDeclared  string         `json:"licenseDeclared"`
	CopyrightText    string         `json:"copyrightText"`
	Checksums        []spdxChecksum `json:"checksums,omitempty"`
	ExternalRefs     []spdxRef      `json:"externalRefs,omitempty"`
}

type spdxChecksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRelationship struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

const noAssertion = "NOASSERTION"

// sbom lists what an image is made of: the Go modules that its programs were linked from, and the Debian packages.
func sbom(s spec, digest string, l lock, debs []wanted, mods []goModule) ([]byte, error) {
	self := spdxPackage{
		SPDXID: "SPDXRef-Image", Name: "overlayd", VersionInfo: s.version, Purpose: "CONTAINER", DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: "Apache-2.0", CopyrightText: noAssertion,
		Checksums: []spdxChecksum{{"SHA256", strings.TrimPrefix(digest, "sha256:")}},
	}
	doc := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT", Name: "overlayd-image-" + string(s.arch),
		DocumentNamespace: "https://github.com/overlayd/overlayd/spdx/" + string(s.arch) + "/" + strings.TrimPrefix(digest, "sha256:"),
		CreationInfo:      spdxCreation{s.created.Format(time.RFC3339), []string{"Tool: overlay-image"}},
		Packages:          []spdxPackage{self},
		Relationships:     []spdxRelationship{{"SPDXRef-DOCUMENT", "DESCRIBES", self.SPDXID}},
	}
	var parts []spdxPackage
	for _, p := range l.of(s.arch) {
		parts = append(parts, debianPackage(l, p, licenceIn(debs, p.name)))
	}
	for _, m := range mods {
		p, err := modulePackage(m)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
	}
	slices.SortFunc(parts, func(a, b spdxPackage) int { return cmp.Compare(a.SPDXID, b.SPDXID) })
	for _, p := range parts {
		doc.Packages = append(doc.Packages, p)
		doc.Relationships = append(doc.Relationships, spdxRelationship{self.SPDXID, "CONTAINS", p.SPDXID})
	}
	out, err := json.MarshalIndent(doc, "", " ")
	return append(out, '\n'), err
}

func licenceIn(debs []wanted, name string) string {
	for _, d := range debs {
		if d.name == name {
			return d.licence
		}
	}
	return noAssertion
}

func debianPackage(l lock, p pinned, licence string) spdxPackage {
	urls := l.urls(p)
	return spdxPackage{
		SPDXID: spdxID("Debian", p.name), Name: p.name, VersionInfo: p.version, DownloadLocation: urls[len(urls)-1],
		LicenseConcluded: noAssertion, LicenseDeclared: licence, CopyrightText: noAssertion, Checksums: []spdxChecksum{{"SHA256", p.sha256}},
		ExternalRefs: []spdxRef{{"PACKAGE-MANAGER", "purl", fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s&distro=debian-%s", p.name, purlEscape(p.version), p.arch, release)}},
	}
}

func modulePackage(m goModule) (spdxPackage, error) {
	p := spdxPackage{
		SPDXID: spdxID("Go", m.path), Name: m.path, VersionInfo: m.version, DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: m.licence, CopyrightText: noAssertion,
		ExternalRefs: []spdxRef{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + m.path + "@" + purlEscape(m.version)}},
	}
	if m.path == "stdlib" {
		p.DownloadLocation = "https://go.dev/dl/"
		return p, nil
	}
	p.DownloadLocation = "https://" + m.path
	raw, ok := strings.CutPrefix(m.sum, "h1:")
	if !ok {
		return p, fmt.Errorf("%s: expected a hash of the module in the program, found %q", m.path, m.sum)
	}
	// The hash of go.sum is over the module's files, not over one archive: a comment of its own kind, and no checksum.
	sum, err := base64.StdEncoding.DecodeString(raw)
	p.ExternalRefs = append(p.ExternalRefs, spdxRef{"OTHER", "go-sum-h1", hex.EncodeToString(sum)})
	return p, err
}

func spdxID(kind, name string) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' {
			return r
		}
		return '-'
	}, name)
	return "SPDXRef-" + kind + "-" + clean
}

func purlEscape(version string) string {
	return strings.NewReplacer("+", "%2B", ":", "%3A").Replace(version)
}
